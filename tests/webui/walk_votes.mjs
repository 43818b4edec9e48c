// Voting in a running WebUI with the demo checkpoint: 60 pairs by the keyboard for a taste that can be computed in the
// page (the more colourful picture), fit, train on the taste head, compare; a picture of every stop.
//
//     npm install playwright-core; node tests/webui/walk_votes.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// VOTES (default 60), UPDATES (default 60), NAME (default by-votes), CHROMIUM as in walk.mjs. Exit 1: a step failed.
import { chromium } from "playwright-core";

const [url, folder] = process.argv.slice(2);
const VOTES = Number(process.env.VOTES || "60");
const UPDATES = process.env.UPDATES || "60";
const NAME = process.env.NAME || "by-votes";
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
});
const page = await browser.newPage({ viewport: { width: 1280, height: 1000 } });
const heard = [];
page.on("pageerror", (error) => heard.push("pageerror " + error.message));
page.on("console", (message) => message.type() === "error" && heard.push("console " + message.text()));
const pause = (ms) => page.waitForTimeout(ms);
const pick = async (id, text) => {
    await page.locator(`#${id} input`).first().click();
    await pause(400);
    await page.locator(`#${id} ul.options li`, { hasText: text }).first().click();
    await pause(900);
};
const fill = async (id, text) => {
    const box = page.locator(`#${id} textarea, #${id} input`).first();
    await box.fill(text);
    await box.press("Tab");
    await pause(200);
};
const inner = async (name) => {
    await page.locator("#spo_tabs > .tab-nav button", { hasText: name }).click();
    await pause(800);
};
const shot = async (name) => {
    await page.screenshot({ path: `${folder}/${name}.png` });
    console.log("picture", name);
};
const pair = () => page.locator("#spo_vote_pair .spo-vote").first().evaluate((e) => e.dataset.pair);
const phase = () => page.locator("#spo_status .spo-status").first().evaluate((e) => e.dataset.phase);
async function until(what, test, seconds) {
    for (let k = 0; k < seconds * 4; k++) {
        if (await test()) return;
        await pause(250);
    }
    throw new Error(`${what}: not within ${seconds} s`);
}
// Hasler and Suesstrunk's colourfulness of the two pictures
const colours = () => page.evaluate(() => [...document.querySelector("gradio-app").querySelectorAll("#spo_vote_pair img")].map((image) => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    const n = data.length / 4;
    let [a, aa, b, bb] = [0, 0, 0, 0];
    for (let i = 0; i < data.length; i += 4) {
        const rg = data[i] - data[i + 1];
        const yb = (data[i] + data[i + 1]) / 2 - data[i + 2];
        a += rg; aa += rg * rg; b += yb; bb += yb * yb;
    }
    const spread = Math.sqrt(aa / n - (a / n) ** 2 + bb / n - (b / n) ** 2);
    return spread + 0.3 * Math.hypot(a / n, b / n);
}));

try {
    await page.goto(url, { waitUntil: "domcontentloaded" });
    await page.waitForSelector("#txt2img_generate", { state: "visible", timeout: 120000 });
    await pause(3500);
    await pick("setting_sd_model_checkpoint", "spo-demo");
    await pause(5000);
    await page.locator("#tabs > .tab-nav button", { hasText: /^\s*SPO\s*$/ }).click();
    await inner("Vote");
    await fill("spo_vote_folder", NAME);
    await page.locator("#spo_vote_bundled").click();
    for (const side of ["width", "height"]) await fill(`spo_vote_${side}`, "64");
    await page.locator("#spo_vote_start").click();
    const began = Date.now();
    let last = "";
    for (let n = 0; n < VOTES; n++) {
        let now = "";
        await until("a pair", async () => (now = await pair()) !== "" && now !== last, 120);
        last = now;
        const [left, right] = await colours();
        if (n === 12) {
            await page.evaluate(() => window.scrollTo(0, 0));
            await shot("vote");
        }
        await page.keyboard.press(left > right ? "ArrowLeft" : "ArrowRight");
        if (n === 20) { // take one back and vote again
            await until("the next", async () => !["", last].includes(await pair()), 60);
            await page.keyboard.press("Backspace");
            await until("the pair again", async () => (await pair()) === last, 30);
            await page.keyboard.press(left > right ? "ArrowLeft" : "ArrowRight");
        }
    }
    await pause(1500);
    console.log(`${VOTES} votes in ${((Date.now() - began) / 1000).toFixed(0)} s`);
    await page.locator("#spo_vote_end").click();
    await fill("spo_vote_name", NAME);
    await page.locator("#spo_vote_fit").click();
    await until("the fit", async () => /Saved as|role="alert"/.test(await page.locator("#spo_vote_fitted").first().innerHTML()), 240);
    console.log(await page.locator("#spo_vote_fitted").first().innerText());
    await shot("fitted");

    await inner("Train");
    await pick("spo_preset", "Demo checkpoint");
    await page.locator("#spo_preference_refresh").click();
    await pause(1500);
    await pick("spo_preference", NAME);
    await page.locator("#spo_bundled").click();
    await fill("spo_name", NAME);
    await fill("spo_steps", UPDATES);
    await page.locator("#spo_start").click();
    await until("the end", async () => ["finished", "failed"].includes(await phase()), 900);
    console.log(await page.locator("#spo_status .spo-message").first().innerText());
    await shot("trained_on_votes");
    await inner("Compare");
    await page.locator("#spo_compare_refresh").click();
    await pause(1500);
    await page.locator("#spo_compare_loras input").first().click();
    await pause(400);
    await page.locator("#spo_compare_loras ul.options li", { hasText: new RegExp(`${NAME}\\s*$`) }).first().click();
    await page.keyboard.press("Tab");
    await fill("spo_compare_prompts", "owl\nrocket");
    for (const side of ["width", "height"]) await fill(`spo_compare_${side}`, "64");
    await page.locator("#spo_compare_start").click();
    await until("the comparison", async () => (await phase()) === "finished" && (await page.locator("#spo_compare_status img").count()), 240);
    await pause(1000);
    await shot("compare_votes");
    const strange = heard.filter((text) => !/ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED|reading 'props'/.test(text));
    console.log(strange.length ? "CONSOLE " + strange.join("\n") : "no console errors of ours");
    if (strange.length) process.exitCode = 1;
} catch (error) {
    console.log("FAILED", error.message, heard);
    await page.screenshot({ path: `${folder}/failed.png` });
    process.exitCode = 1;
}
await browser.close();
