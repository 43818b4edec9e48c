// What the walks have in common: a page of a running WebUI, and steps on it; every click is counted.
import { chromium } from "playwright-core";

const [url, folder] = process.argv.slice(2);
// the WebUI's own: a script from a CDN that an offline machine cannot reach, and a gradio complaint at changed sizes
const known = /ERR_NAME_NOT_RESOLVED|ERR_INTERNET_DISCONNECTED|reading 'props'/;
export const heard = [];
export const counted = { clicks: 0 };
export let page;
let browser;

export async function open(width = 1280, height = 1150, theme = "light") {
    browser ??= await chromium.launch({
        executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
        args: ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"],
    });
    if (page) await page.close();
    page = await browser.newPage({ viewport: { width, height } });
    page.on("pageerror", (error) => heard.push("pageerror " + (error.stack || error.message).split("\n").slice(0, 3).join(" ")));
    page.on("console", (message) => message.type() === "error" && heard.push("console " + message.text()));
    page.on("dialog", (dialog) => dialog.accept());
    await page.goto(`${url}/?__theme=${theme}`, { waitUntil: "domcontentloaded" });
    await page.waitForSelector("#txt2img_generate", { state: "visible", timeout: 120000 });
    await page.waitForTimeout(3500);
}
export const pause = (ms) => page.waitForTimeout(ms);
export async function click(selector) {
    counted.clicks += 1;
    await page.locator(selector).first().click();
    await pause(300);
}
export async function tab(name) {
    await page.locator("#tabs > .tab-nav button", { hasText: new RegExp(`^\\s*${name}\\s*$`, "i") }).first().click(); // Forge: Txt2img
    await pause(1200);
}
export async function inner(name) {
    await page.locator("#spo_tabs > .tab-nav button", { hasText: name }).click();
    await pause(800);
}
export async function pick(id, text) {
    const field = id === "setting_sd_model_checkpoint" ? `:is(#${id}, .model_selection)` : `#${id}`; // or Forge's
    await page.locator(`${field} input`).first().click();
    await pause(400);
    await page.locator(`${field} ul.options li`, { hasText: text }).first().click();
    await pause(900);
}
export async function fill(id, text) {
    const box = page.locator(`#${id} textarea, #${id} input`).first();
    await box.fill(text);
    await box.press("Tab");
    await pause(300);
}
// Saved settings on the Train tab, or the demo's preset
export async function settings(saved) {
    if (!saved) return pick("spo_preset", "Demo checkpoint");
    await page.locator("#spo_saved .label-wrap").first().click();
    await pick("spo_settings_load", saved);
    await pause(2500);
}
export const value = (id) => page.locator(`#${id} textarea, #${id} input`).first().inputValue();
export async function shot(name) {
    await page.screenshot({ path: `${folder}/${name}.png` });
    console.log("picture", name);
}
export const told = (name) => page.locator("#spo_status .spo-status").first().evaluate((e, name) => e.dataset[name], name);
export const phase = () => told("phase");
export const message = () => page.locator("#spo_status .spo-message").first().innerText();
export async function until(what, test, seconds) {
    for (let k = 0; k < seconds * 4; k++) {
        if (await test()) return;
        await pause(250);
    }
    throw new Error(`${what}: not within ${seconds} s; ${await message()}`);
}
export function expect(what, right) {
    if (!right) throw new Error(what);
}
// Hasler and Suesstrunk's colourfulness of the pictures in an element; TASTE=red: how much more red than green they are
export const colours = (within) => page.evaluate(([within, taste]) => [...document.querySelector("gradio-app").querySelectorAll(`${within} img`)].map((image) => {
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
    if (taste === "red") return a / n;
    const spread = Math.sqrt(aa / n - (a / n) ** 2 + bb / n - (b / n) ** 2);
    return spread + 0.3 * Math.hypot(a / n, b / n);
}), [within, process.env.TASTE]);

// The most colourful is the best, the least the worst
export async function vote(size) {
    const values = await colours("#spo_vote_pair");
    const best = values.indexOf(Math.max(...values));
    const worst = values.indexOf(Math.min(...values));
    if (size === 2) return page.keyboard.press(best === 0 ? "ArrowLeft" : "ArrowRight");
    await page.keyboard.press(String(best + 1));
    await page.keyboard.press(String(worst + 1));
}
export async function walk(steps) {
    try {
        await steps();
        const strange = heard.filter((text) => !known.test(text));
        console.log(strange.length ? "CONSOLE " + strange.join("\n") : "no console errors of ours");
        if (strange.length) process.exitCode = 1;
    } catch (error) {
        console.log("FAILED", error.message, heard);
        if (page) await page.screenshot({ path: `${folder}/failed.png` });
        process.exitCode = 1;
    }
    if (browser) await browser.close();
}
