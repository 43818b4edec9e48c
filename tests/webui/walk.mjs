// A walk through the SPO tab of a running WebUI, as a new user goes it, with the demo checkpoint installed and --api on:
// train, watch, stop, resume, finish, send to txt2img, X/Y/Z plot over weight, compare; a picture of every stop.
//
//     npm install playwright-core; node tests/webui/walk.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// CHROMIUM names the browser (default /usr/bin/chromium), UPDATES the length of the run (default 110), NAME the LoRA;
// FROM=compare begins at the comparison, with a LoRA that is there. Exit 1: a step failed.
import { chromium } from "playwright-core";

const [url, folder] = process.argv.slice(2);
const UPDATES = process.env.UPDATES || "110";
const NAME = process.env.NAME || "vivid";
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
const heard = [];
// the WebUI's own: a script from a CDN that an offline machine cannot reach, and a gradio complaint at changed sizes
const known = /ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED|reading 'props'/;
let page;

async function open(width = 1280, height = 1150, theme = "light") {
    page = await browser.newPage({ viewport: { width, height } });
    page.on("pageerror", (error) => heard.push("pageerror " + error.message));
    page.on("console", (message) => message.type() === "error" && heard.push("console " + message.text()));
    await page.goto(`${url}/?__theme=${theme}`, { waitUntil: "domcontentloaded" });
    await page.waitForSelector("#txt2img_generate", { state: "visible", timeout: 120000 });
    await page.waitForTimeout(3500);
}
const tab = async (name) => {
    await page.locator("#tabs > .tab-nav button", { hasText: new RegExp(`^\\s*${name}\\s*$`) }).first().click();
    await page.waitForTimeout(1200);
};
const inner = async (name) => {
    await page.locator("#spo_tabs > .tab-nav button", { hasText: name }).click();
    await page.waitForTimeout(800);
};
const pick = async (id, text) => {
    await page.locator(`#${id} input`).first().click();
    await page.waitForTimeout(400);
    await page.locator(`#${id} ul.options li`, { hasText: text }).first().click();
    await page.waitForTimeout(900);
};
const fill = async (id, text) => {
    const box = page.locator(`#${id} textarea, #${id} input`).first();
    await box.fill(text);
    await box.press("Tab");
    await page.waitForTimeout(300);
};
const shot = async (name) => {
    await page.screenshot({ path: `${folder}/${name}.png` });
    console.log("picture", name);
};
const phase = () => page.locator("#spo_status .spo-status").first().evaluate((e) => e.dataset.phase);
const message = () => page.locator("#spo_status .spo-message").first().innerText();
async function until(what, test, seconds) {
    for (let k = 0; k < seconds; k++) {
        if (await test()) return;
        await page.waitForTimeout(1000);
    }
    throw new Error(`${what}: not within ${seconds} s; ${await message()}`);
}

async function train() {
    await open();
    await pick("setting_sd_model_checkpoint", "spo-demo");
    await page.waitForTimeout(5000);
    await tab("SPO");
    await pick("spo_preset", "Demo checkpoint");
    await page.locator("#spo_bundled").click();
    await fill("spo_name", NAME);
    await fill("spo_steps", UPDATES);
    await page.locator("#spo_start").click();
    await until("a pool and a curve", async () => (await page.locator("#spo_status .spo-pool").count()) && (await page.locator("#spo_status .spo-curves").count()), 300);
    await page.waitForTimeout(3000);
    await shot("running");
    await page.close();

    await open(1920, 1080, "dark"); // closing the browser changes nothing; another page shows the same run
    await tab("SPO");
    await until("the run on another page", async () => (await phase()) === "working", 20);
    await page.waitForTimeout(3000);
    await shot("running_dark");
    await page.locator("#spo_sample").click();
    await page.waitForTimeout(8000);
    await page.locator("#spo_stop_save").click();
    await until("stopped", async () => (await phase()) === "stopped", 120);
    console.log(await message());
    await inner("Runs");
    await page.locator("#spo_run_refresh").click();
    await page.waitForTimeout(1500);
    await pick("spo_run", NAME);
    await page.waitForTimeout(1500);
    await shot("runs_dark");
    await page.locator("#spo_resume").click();
    await until("going on", async () => ["loading", "working"].includes(await phase()), 30);
    await page.close();

    await open();
    await tab("SPO");
    await until("the end", async () => (await phase()) === "finished", 1500);
    console.log(await message());
    await page.waitForTimeout(1500);
    await shot("finished");
    await page.locator("#spo_send").click();
    await page.waitForTimeout(1000);
    const prompt = await page.locator("#txt2img_prompt textarea").inputValue();
    if (!prompt.includes(`<lora:${NAME}:1>`)) throw new Error(`the prompt is "${prompt}"`);
    await fill("txt2img_prompt", `strawberry <lora:${NAME}:1>`);
    for (const side of ["width", "height"]) await page.locator(`#txt2img_${side} input[type=number]`).fill("64");
    await page.locator("#txt2img_cfg_scale input[type=number]").fill("5");
    await page.locator("#txt2img_seed input").fill("3");
    await pick("script_list", "X/Y/Z plot");
    await pick("script_txt2img_xyz_plot_x_type", "[SPO] weight");
    await fill("script_txt2img_xyz_plot_x_values", "-1, -0.5, 0, 0.5, 1, 1.5");
    await pick("script_txt2img_xyz_plot_y_type", "Prompt S/R");
    await fill("script_txt2img_xyz_plot_y_values", "strawberry, rose, owl");
    await page.locator("#txt2img_generate").click();
    await until("the plot", async () => (await page.locator("#txt2img_gallery img").count()) > 0 && !(await page.locator("#txt2img_results .progressDiv").count()), 240);
    await page.waitForTimeout(1500);
    await page.evaluate(() => window.scrollTo(0, 0));
    await shot("xyz");
}

try {
    if (process.env.FROM !== "compare") await train();
    else await open();
    await tab("SPO");
    await inner("Compare");
    await page.locator("#spo_compare_refresh").click();
    await page.waitForTimeout(1500);
    await page.locator("#spo_compare_loras input").first().click();
    await page.waitForTimeout(400);
    await page.locator("#spo_compare_loras ul.options li", { hasText: new RegExp(`${NAME}\\s*$`) }).first().click();
    await page.keyboard.press("Tab");
    await fill("spo_compare_prompts", "strawberry\nowl\nrocket");
    await fill("spo_compare_seeds", "1, 2");
    await pick("spo_compare_preference", "demo");
    for (const side of ["width", "height"]) await fill(`spo_compare_${side}`, "64");
    await page.locator("#spo_compare_start").click();
    await until("the comparison", async () => (await phase()) === "finished" && (await page.locator("#spo_compare_status img").count()), 240);
    await page.waitForTimeout(1000);
    await shot("compare");

    await tab("txt2img");
    await page.locator("#txt2img_extra_tabs > .tab-nav button", { hasText: "Lora" }).click();
    await page.waitForTimeout(1000);
    await page.locator("#txt2img_lora_extra_refresh >> visible=true").first().click();
    await page.waitForTimeout(3000);
    await page.locator("#txt2img_lora_cards_html").first().scrollIntoViewIfNeeded();
    await shot("cards");
    const strange = heard.filter((text) => !known.test(text));
    console.log(strange.length ? "CONSOLE " + strange.join("\n") : "no console errors of ours");
    if (strange.length) process.exitCode = 1;
} catch (error) {
    console.log("FAILED", error.message, heard);
    await page.screenshot({ path: `${folder}/failed.png` });
    process.exitCode = 1;
}
await browser.close();
