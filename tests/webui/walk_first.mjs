// The first minute in a WebUI where SPO was never used: one click to a running demo, one to its pictures with and
// without the LoRA, one to txt2img. Clicks are counted; a picture of every stop.
//
//     npm install playwright-core; node tests/webui/walk_first.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// Another checkpoint than spo-demo must be loaded, and models/SPO/runs be empty. CHROMIUM names the browser; UPDATES:
// stop and save there (with --api), on a machine that has no minutes.
import { click, counted, expect, fill, message, open, page, pause, phase, shot, tab, until, value, walk } from "./walk_steps.mjs";

await walk(async () => {
    await open();
    await tab("SPO");
    await shot("first_new");
    counted.clicks = 0;
    await click("#spo_try");
    await until("a running demo", async () => (await phase()) === "working", 120);
    expect("the demo took more than a click", counted.clicks === 1);
    await until("a pool and a curve", async () => (await page.locator("#spo_pool .spo-pool").count()) && (await page.locator("#spo_curves svg").count()), 300);
    await until("the checkpoint at the top", async () => (await value("setting_sd_model_checkpoint")).startsWith("spo-demo"), 20);
    await until("the preset", async () => (await value("spo_preset")) === "Demo checkpoint", 20);

    await page.locator("#spo_log_box .label-wrap").click(); // an opened log stays open, and a large picture, too
    await page.locator("#spo_pool .spo-zoom").first().click();
    await pause(6000);
    await shot("first_large");
    expect("the large picture closed", await page.locator("#spo_large").isVisible());
    await page.keyboard.press("Escape");
    expect("the log closed", await page.locator("#spo_log pre").isVisible());
    await page.locator("#spo_log_box .label-wrap").click();
    await shot("first_running");

    if (process.env.UPDATES) {
        const step = async () => (await (await fetch(`${process.argv[2]}/spo/v1/status`)).json()).step;
        await until("some updates", async () => (await step()) >= Number(process.env.UPDATES), 1500);
        await page.locator("#spo_stop_save").click();
    }
    await until("the end", async () => ["finished", "stopped"].includes(await phase()), 1500);
    console.log(await message());
    await pause(1500);
    await shot("first_finished");
    await click("#spo_compare");
    const compared = () => page.locator("#spo_compare_status .spo-status").first().evaluate((e) => e.dataset.phase);
    await until("the grid", async () => (await compared()) === "finished" && (await page.locator("#spo_compare_pictures img").count()), 240);
    await pause(1000);
    await shot("first_compare");
    expect(`${counted.clicks} clicks to the grid`, counted.clicks === 2);

    await page.locator("#spo_tabs > .tab-nav button", { hasText: "Train" }).click();
    await pause(2500);
    await click("#spo_send");
    await pause(800);
    const prompt = await value("txt2img_prompt");
    expect(`the prompt is "${prompt}"`, /^\S.* <lora:demo(-step\d+)?:1>$/.test(prompt));
    await click("#txt2img_generate");
    await until("the picture", async () => (await page.locator("#txt2img_gallery img").count()) > 0 && !(await page.locator("#txt2img_results .progressDiv").count()), 120);
    await pause(1000);
    await shot("first_txt2img");
    console.log(`${counted.clicks} clicks in all`);
});
