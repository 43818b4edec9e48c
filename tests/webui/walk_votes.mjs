// Voting in a running WebUI with the demo checkpoint, by the keyboard and for a taste that can be computed in the page
// (the more colourful picture): pairs, or pools of four; fit, train on the taste head, compare; pictures of the stops.
//
//     npm install playwright-core; node tests/webui/walk_votes.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// VOTES (default 60; of pools 12), SIZE (2 or 4 pictures at a time, default 4), UPDATES (default 60; 0: without
// training), NAME (default by-votes), CHROMIUM as in walk.mjs. CHECKPOINT and VOTE_STEPS: another checkpoint than the
// demo's, which forks do not take, and how many sampling steps its pictures get; DIFFER=seeds: pictures of different
// seeds, whose differences are plainer; SETTINGS: saved ones to train by, in place of the demo's preset. Exit 1: a step
// failed.
import { expect, fill, inner, open, page, pause, phase, pick, settings, shot, tab, until, value, vote, walk } from "./walk_steps.mjs";

const SIZE = Number(process.env.SIZE || "4");
const VOTES = Number(process.env.VOTES || (SIZE === 2 ? "60" : "12"));
const UPDATES = process.env.UPDATES || "60";
const NAME = process.env.NAME || "by-votes";
const CHECKPOINT = process.env.CHECKPOINT || "spo-demo";
const shown = (name) => page.locator("#spo_vote_pair .spo-vote").first().evaluate((e, name) => e.dataset[name], name);
await walk(async () => {
    await open(1280, 1000);
    await pick("setting_sd_model_checkpoint", CHECKPOINT);
    await pause(5000);
    await tab("SPO");
    await inner("Preference");
    await page.locator("#spo_vote_making .label-wrap").click();
    await fill("spo_vote_folder", NAME);
    await page.locator("#spo_vote_bundled").click();
    await until("the prompts to vote on", async () => (await value("spo_vote_prompts")) !== "", 60);
    if (SIZE === 2) await page.locator("#spo_vote_size label", { hasText: "Two" }).click();
    for (const side of ["width", "height"]) await fill(`spo_vote_${side}`, "64");
    if (process.env.DIFFER === "seeds") await page.locator("#spo_vote_how label", { hasText: "Different seeds" }).click();
    if (process.env.VOTE_STEPS) await page.locator("#spo_vote_steps input[type=number]").fill(process.env.VOTE_STEPS);
    await page.locator("#spo_vote_start").click();
    const began = Date.now();
    const refusal = page.locator("#spo_vote_said [role=alert]");
    let last = "";
    for (let n = 0; n < VOTES; n++) {
        let now = "";
        await until("pictures", async () => {
            now = await shown("pair");
            if (now === "" && (await refusal.count())) throw new Error(await refusal.first().innerText());
            return now !== "" && now !== last;
        }, 600);
        last = now;
        if (n === Math.min(12, VOTES - 1)) {
            await page.evaluate(() => window.scrollTo(0, 0));
            await shot(`vote_${SIZE}`);
        }
        await vote(SIZE);
        if (n === Math.min(20, VOTES - 2)) { // take one back and vote again
            await until("the next", async () => !["", last].includes(await shown("pair")), 300);
            await page.keyboard.press("Backspace");
            await until("the pictures again", async () => (await shown("pair")) === last, 30);
            await vote(SIZE);
        }
    }
    await pause(1500);
    console.log(`${VOTES} votes in ${((Date.now() - began) / 1000).toFixed(0)} s`);
    await page.locator("#spo_vote_end").click();
    await page.locator("#spo_vote_gallery .label-wrap").first().click();
    await page.locator("#spo_vote_look").click();
    await until("the wall", async () => (await page.locator("#spo_vote_wall figure").count()) > 0, 30);
    const pressed = () => page.locator("#spo_vote_wall figure").first().locator("[aria-pressed=true]").getAttribute("data-answer");
    const answer = await pressed();
    await page.locator("#spo_vote_wall figure").first().locator("[data-answer=tie]").click();
    await until("the changed answer", async () => (await pressed()) === "tie", 20);
    await page.locator("#spo_vote_wall figure").first().locator(`[data-answer=${answer}]`).click();
    await until("the answer again", async () => (await pressed()) === answer, 20);
    await page.locator("#spo_vote_wall").first().scrollIntoViewIfNeeded();
    await shot(`wall_${SIZE}`);

    await fill("spo_vote_name", NAME);
    await page.locator("#spo_vote_fit").click();
    await until("the fit", async () => /Saved as|role="alert"/.test(await page.locator("#spo_vote_fitted").first().innerHTML()), 1500);
    const fitted = await page.locator("#spo_vote_fitted").first().innerText();
    console.log(fitted);
    await page.locator("#spo_vote_fit").scrollIntoViewIfNeeded();
    await shot(`fitted_${SIZE}`);
    if (UPDATES === "0") return;
    expect("nothing was fitted", fitted.includes("Saved as"));

    await inner("Train");
    await settings(process.env.SETTINGS);
    await page.locator("#spo_preference_refresh").click();
    await pause(1500);
    await pick("spo_preference", NAME);
    await page.locator("#spo_bundled").click();
    await until("the prompts", async () => (await value("spo_prompts")) !== "", 60);
    await fill("spo_name", NAME);
    await fill("spo_steps", UPDATES);
    await page.locator("#spo_start").click();
    await until("its start, not the end of an earlier run", async () => ["working", "failed"].includes(await phase()), 120);
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
    await fill("spo_compare_prompts", "mushroom\nrocket");
    for (const side of ["width", "height"]) await fill(`spo_compare_${side}`, "64");
    if (process.env.VOTE_STEPS) await fill("spo_compare_steps", process.env.VOTE_STEPS);
    const said = () => page.locator("#spo_compare_status").first().innerText();
    const before = await said(); // of an earlier comparison
    await page.locator("#spo_compare_start").click();
    const compared = () => page.locator("#spo_compare_status .spo-status").first().evaluate((e) => e.dataset.phase);
    await until("the comparison", async () => (await compared()) === "finished" && (await said()) !== before && (await page.locator("#spo_compare_pictures img").count()), 900);
    await pause(1000);
    await shot("compare_votes");
});
