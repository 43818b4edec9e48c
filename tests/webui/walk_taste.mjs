// From nothing to pictures that follow a taste, in a running WebUI with the demo checkpoint: pools of four by keys, for a
// taste that can be computed in the page (the more colourful picture); fit; the script "SPO taste" in txt2img, at several
// strengths, and off again; what a picture's infotext gives back. It says how long each part took, and how much of it was
// a person's: the keys and clicks, without waiting for pictures and for the fit.
//
//     npm install playwright-core; node tests/webui/walk_taste.mjs http://127.0.0.1:7860 FOLDER_FOR_PICTURES
//
// POOLS (default 12), NAME (default liked; 0 pools: a head of that name is there already), CHROMIUM as in walk.mjs.
// Exit 1: a step failed.
import { colours, counted, click, expect, fill, inner, open, page, pause, pick, shot, tab, until, vote, walk } from "./walk_steps.mjs";

const POOLS = Number(process.env.POOLS || "12");
const NAME = process.env.NAME || "liked";
const LOOK_S = 4; // a person looks at four pictures before the two keys
const shown = (name) => page.locator("#spo_vote_pair .spo-vote").first().evaluate((e, name) => e.dataset[name], name);
const GALLERY = "#txt2img_gallery .grid-container";
let ownS = 0; // a person's seconds
let last = "";

async function part(what, steps, person = true) {
    const began = Date.now();
    await steps();
    const seconds = (Date.now() - began) / 1000;
    if (person) ownS += seconds;
    console.log(`${what}: ${seconds.toFixed(0)} s${person ? "" : " of waiting"}`);
}

// Pictures of txt2img as they are now asked for, their mean colourfulness, and how long they took
async function generate(name) {
    const sources = () => page.locator(`${GALLERY} img`).evaluateAll((images) => images.map((image) => image.src).join());
    const before = await sources().catch(() => "");
    const began = Date.now();
    await page.locator("#txt2img_generate").click();
    await until("pictures", async () => ![before, ""].includes(await sources().catch(() => "")), 240);
    await until("their end", async () => page.locator("#txt2img_interrupt").isHidden(), 60);
    const seconds = (Date.now() - began) / 1000;
    await pause(1500);
    const values = await colours(GALLERY);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    console.log(`${name}: ${values.length} pictures, colourfulness ${mean.toFixed(1)}, ${seconds.toFixed(1)} s`);
    await page.locator("#txt2img_generate").scrollIntoViewIfNeeded();
    await shot(`taste_${name}`);
    return { mean, sources: await sources(), seconds };
}

await walk(async () => {
    await open(1280, 1000);
    await pick("setting_sd_model_checkpoint", "spo-demo");
    await pause(5000);
    if (POOLS) {
        await part("asked for pictures", async () => {
            await tab("SPO");
            await inner("Preference");
            await click("#spo_vote_bundled");
            await page.locator("#spo_vote_making .label-wrap").click();
            await fill("spo_vote_folder", NAME);
            for (const side of ["width", "height"]) await fill(`spo_vote_${side}`, "64");
            await click("#spo_vote_start");
        });
        for (let n = 0; n < POOLS; n++) {
            let now = "";
            await until("pictures", async () => (now = await shown("pair")) !== "" && now !== last, 180);
            last = now;
            await vote(4);
            ownS += LOOK_S;
            if (n === 2) await shot("taste_votes");
        }
        await part("ended voting", async () => {
            await pause(1000);
            await click("#spo_vote_end");
            await fill("spo_vote_name", NAME);
            await click("#spo_vote_fit");
        });
        const fitted = () => page.locator("#spo_vote_fitted").first();
        await part("the fit", () => until("the fit", async () => /Saved as|role="alert"/.test(await fitted().innerHTML()), 590), false);
        expect("nothing was fitted: " + (await fitted().innerText()), (await fitted().innerText()).includes("Saved as"));
    }

    await tab("txt2img");
    await fill("txt2img_prompt", "mushroom");
    for (const side of ["width", "height"]) await fill(`txt2img_${side}`, "64");
    await fill("txt2img_batch_size", "4");
    await fill("txt2img_cfg_scale", "5");
    await fill("txt2img_seed", "1");
    const plain = await generate("off");
    await part("switched the taste on", async () => {
        await click("#spo_taste_txt2img .label-wrap");
        await click("#spo_taste_txt2img_refresh");
        await pause(1200);
        await pick("spo_taste_txt2img_model", `${NAME}.safetensors`);
        await click("#spo_taste_txt2img_enabled input");
    });
    const full = await generate("on");
    expect("the taste is not followed", full.mean > plain.mean);
    console.log(`a person's time from nothing to the first steered pictures: ${ownS.toFixed(0)} s, with ${LOOK_S} s of looking at each pool; ${counted.clicks} clicks counted`);
    for (const strength of ["0.25", "2"]) {
        await fill("spo_taste_txt2img_strength", strength);
        await generate(`strength_${strength}`);
    }
    await page.locator("#spo_taste_txt2img_how label").nth(1).click();
    await pick("txt2img_sampling", /Euler a\s*$/);
    const chosen = await generate("chosen");
    expect("choosing changes nothing", chosen.sources !== full.sources);

    // its own infotext, pasted, fills the fields again, and off is the first picture again
    const infotext = await page.locator("#html_info_txt2img").first().innerText();
    expect("the infotext does not tell: " + infotext, infotext.includes(`SPO taste: ${NAME}.safetensors`));
    await click("#spo_taste_txt2img_enabled input");
    await fill("txt2img_prompt", infotext.trim());
    await click("#paste");
    await pause(2500);
    expect("pasting does not switch it on", await page.locator("#spo_taste_txt2img_enabled input").isChecked());
    await shot("taste_pasted");
    await pick("txt2img_sampling", /DPM\+\+ 2M\s*$/);
    await page.locator("#txt2img_generate").click();
    await until("the refusal", async () => (await page.locator("#html_log_txt2img").first().innerText()).includes("has no independent noise"), 60);
    await shot("taste_refused");
});
