// The tab by axe-core, light and dark, every inner tab with everything opened, and what the keyboard reaches; pictures at
// 1280 and 1920, and at 800.
//
//     npm install playwright-core axe-core; node tests/webui/walk_axe.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// Exit 1: a serious or critical finding in what is ours (gradio's own widgets are named apart), or something that the
// keyboard does not reach.
import { createRequire } from "node:module";
import { expect, inner, open, page, pause, shot, tab, walk } from "./walk_steps.mjs";

const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
const TABS = ["Train", "Preference", "Compare", "Runs"];
const ours = new Map();
const gradios = new Map();

// what gradio 3.41 draws itself, the same in every tab of the WebUI
function isGradios(node) {
    const html = node.html;
    const drawn = !/spo-|role="status"/.test(html) && /svelte-|class="(wrap|label-wrap|secondary-wrap|token|border-none|icon|tab-nav)/.test(html);
    return drawn || /component-\d+/.test(node.target.join(" ")) && !/spo-/.test(html);
}

async function look(name) {
    await page.addScriptTag({ path: axe });
    const found = await page.evaluate(() => window.axe.run("#tab_spo", { resultTypes: ["violations"] }));
    for (const violation of found.violations) {
        if (!["serious", "critical"].includes(violation.impact)) continue;
        for (const node of violation.nodes) {
            const list = isGradios(node) ? gradios : ours;
            const key = `${violation.id} (${violation.impact})`;
            list.set(key, [...(list.get(key) || []), `${name}: ${node.html.slice(0, 160)}`]);
        }
    }
}

async function openAll() {
    for (let k = 0; k < 12; k++) {
        const closed = page.locator("#tab_spo .label-wrap:not(.open):visible").first();
        if (!(await closed.count())) return;
        await closed.click();
        await pause(200);
    }
}

async function byKeyboard(name) {
    const wanted = await page.evaluate(() => {
        const all = [...document.querySelector("gradio-app").querySelectorAll("#tab_spo button, #tab_spo input, #tab_spo textarea, #tab_spo select")];
        const shown = all.filter((one) => one.offsetParent !== null && !one.disabled && one.type !== "file" && getComputedStyle(one).visibility !== "hidden");
        window.spoWanted = shown.filter((one) => one.type !== "radio" || one.checked); // arrows go on inside a group
        window.spoReached = new Set();
        return window.spoWanted.length;
    });
    await page.locator("#spo_tabs > .tab-nav button", { hasText: name }).focus();
    for (let k = 0; k < wanted * 2 + 20; k++) {
        await page.evaluate(() => window.spoReached.add(document.activeElement));
        await page.keyboard.press("Tab");
    }
    const missed = await page.evaluate(() => window.spoWanted.filter((one) => !window.spoReached.has(one)).map((one) => one.outerHTML.slice(0, 140)));
    const before = missed.filter((html) => !/tab-nav|role="tab"/.test(html));
    console.log(`${name}: ${wanted - missed.length} of ${wanted} controls reached by Tab from the tab's own button`);
    return before;
}

await walk(async () => {
    for (const theme of ["light", "dark"]) {
        await open(1280, 1000, theme);
        await tab("SPO");
        for (const name of TABS) {
            await inner(name);
            await shot(`axe_${name.toLowerCase()}_1280_${theme}`);
            await openAll();
            await look(`${name} ${theme}`);
            if (theme === "light") {
                const missed = await byKeyboard(name);
                if (missed.length) console.log("not reached:", missed.join("\n    "));
            }
        }
    }
    for (const [width, theme] of [[1920, "light"], [1920, "dark"], [800, "light"]]) {
        await open(width, 1080, theme);
        await tab("SPO");
        for (const name of TABS.slice(0, 2)) {
            await inner(name);
            await shot(`axe_${name.toLowerCase()}_${width}_${theme}`);
        }
        const wide = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
        expect(`at ${width} the page is ${wide} px too wide`, wide <= 0);
    }
    for (const [key, nodes] of gradios) console.log(`gradio's own: ${key}, ${nodes.length} times, as ${nodes[0]}`);
    for (const [key, nodes] of ours) console.log(`OURS: ${key}\n    ${[...new Set(nodes)].join("\n    ")}`);
    expect("serious findings of ours", ours.size === 0);
});
