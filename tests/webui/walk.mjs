// A walk through the SPO tab of a running WebUI, as a user goes it, with the demo checkpoint installed and --api on:
// train, watch, stop, resume, finish, send to txt2img, X/Y/Z plot over weight, compare; a picture of every stop.
//
//     npm install playwright-core; node tests/webui/walk.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// CHROMIUM names the browser (default /usr/bin/chromium), UPDATES the length of the run (default 110), NAME the LoRA;
// FROM=compare begins at the comparison, with a LoRA that is there. In forks, which do not take
// the demo's checkpoint: CHECKPOINT, PREFERENCE (a model that is there), SETTINGS (saved ones, in place of the demo's
// preset) and PICTURE_STEPS (of the plot's and the comparison's pictures). Exit 1: a step failed.
import { expect, fill, inner, message, open, page, pause, phase, pick, settings, shot, tab, until, value, walk } from "./walk_steps.mjs";

const UPDATES = process.env.UPDATES || "110";
const NAME = process.env.NAME || "vivid";
const { SETTINGS, PICTURE_STEPS } = process.env;

async function train() {
    await open();
    await pick("setting_sd_model_checkpoint", process.env.CHECKPOINT || "spo-demo");
    await pause(5000);
    await tab("SPO");
    await settings(SETTINGS);
    if (process.env.PREFERENCE) await pick("spo_preference", process.env.PREFERENCE);
    await page.locator("#spo_bundled").click();
    await until("the prompts", async () => (await value("spo_prompts")) !== "", 60);
    await fill("spo_name", NAME);
    await fill("spo_steps", UPDATES);
    await page.locator("#spo_start").click();
    await until("a pool and a curve", async () => (await page.locator("#spo_pool .spo-pool").count()) && (await page.locator("#spo_curves svg").count()), 300);
    await pause(3000);
    await shot("running");

    await open(1920, 1080, "dark"); // closing the page changes nothing; another page shows the same run
    await tab("SPO");
    await until("the run on another page", async () => (await phase()) === "working", 20);
    await pause(3000);
    await shot("running_dark");
    await page.locator("#spo_sample").click();
    await pause(8000);
    await page.locator("#spo_stop_save").click();
    await until("stopped", async () => (await phase()) === "stopped", 600);
    console.log(await message());
    await inner("Runs");
    await page.locator("#spo_run_refresh").click();
    await pause(1500);
    await pick("spo_run", NAME);
    await pause(1500);
    await shot("runs_dark");
    await page.locator("#spo_resume").click();
    await until("going on", async () => ["loading", "working"].includes(await phase()), 30);

    await open();
    await tab("SPO");
    await until("the end", async () => ["finished", "failed"].includes(await phase()), 1500);
    console.log(await message());
    expect("the run that was gone on with did not finish", (await phase()) === "finished");
    await pause(1500);
    await shot("finished");
    await page.locator("#spo_send").click();
    await pause(1000);
    const prompt = await value("txt2img_prompt");
    expect(`the prompt is "${prompt}"`, prompt.includes(`<lora:${NAME}:1>`));
    await fill("txt2img_prompt", `strawberry <lora:${NAME}:1>`);
    for (const side of ["width", "height"]) await page.locator(`#txt2img_${side} input[type=number]`).fill("64");
    if (PICTURE_STEPS) await page.locator("#txt2img_steps input[type=number]").fill(PICTURE_STEPS);
    await page.locator("#txt2img_cfg_scale input[type=number]").fill("5");
    await page.locator("#txt2img_seed input").fill("3");
    await pick("script_list", "X/Y/Z plot");
    await pick("script_txt2img_xyz_plot_x_type", "[SPO] weight");
    await fill("script_txt2img_xyz_plot_x_values", "-1, -0.5, 0, 0.5, 1, 1.5");
    await pick("script_txt2img_xyz_plot_y_type", "Prompt S/R");
    await fill("script_txt2img_xyz_plot_y_values", "strawberry, rose, owl");
    await page.locator("#txt2img_generate").click();
    await until("the plot", async () => (await page.locator("#txt2img_gallery img").count()) > 0 && !(await page.locator("#txt2img_results .progressDiv").count()), 900);
    await pause(1500);
    await page.evaluate(() => window.scrollTo(0, 0));
    await shot("xyz");
}

await walk(async () => {
    if (process.env.FROM !== "compare") await train();
    else await open();
    await tab("SPO");
    await inner("Compare");
    await page.locator("#spo_compare_refresh").click();
    await pause(1500);
    await page.locator("#spo_compare_loras input").first().click();
    await pause(400);
    await page.locator("#spo_compare_loras ul.options li", { hasText: new RegExp(`${NAME}\\s*$`) }).first().click();
    await page.keyboard.press("Tab");
    await fill("spo_compare_prompts", "strawberry\nowl\nrocket");
    await fill("spo_compare_seeds", "1, 2");
    await pick("spo_compare_preference", process.env.PREFERENCE || "demo");
    for (const side of ["width", "height"]) await fill(`spo_compare_${side}`, "64");
    if (PICTURE_STEPS) await fill("spo_compare_steps", PICTURE_STEPS);
    await page.locator("#spo_compare_start").click();
    const compared = () => page.locator("#spo_compare_status .spo-status").first().evaluate((e) => e.dataset.phase);
    await until("the comparison", async () => (await compared()) === "finished" && (await page.locator("#spo_compare_pictures img").count()), 900);
    await pause(1000);
    await shot("compare");

    await tab("txt2img");
    await page.locator("#txt2img_extra_tabs > .tab-nav button", { hasText: "Lora" }).click();
    await pause(1000);
    await page.locator("#txt2img_lora_extra_refresh >> visible=true").first().click();
    await pause(3000);
    await page.locator("#txt2img_lora_cards_html").first().scrollIntoViewIfNeeded();
    await shot("cards");
});
