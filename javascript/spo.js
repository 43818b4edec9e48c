"use strict";

// The SPO tab's page side: follow the work that goes on, send a LoRA to txt2img, keys. Everything else is the server's.
(function() {
    const REFRESH_MS = 1500;
    const IDLE_REFRESH_MS = 10000; // another page may have begun something
    let following = null;
    let lastRefresh = 0;
    let lists = null;
    let tryingDemo = false;

    function find(id) {
        return gradioApp().getElementById(id);
    }

    function click(id) {
        const button = find(id);
        if (button) button.click();
    }

    function status() {
        return gradioApp().querySelector("#spo_status .spo-status");
    }

    function isLive(shown) {
        return Boolean(shown) && (shown.dataset.live === "1" || shown.dataset.download === "1");
    }

    function visible() {
        const tab = find("tab_spo");
        return Boolean(tab) && tab.offsetParent !== null && !document.hidden;
    }

    function refresh() {
        lastRefresh = Date.now();
        click("spo_refresh");
    }

    setInterval(function() {
        const wait = isLive(status()) ? REFRESH_MS : IDLE_REFRESH_MS;
        if (visible() && Date.now() - lastRefresh >= wait) refresh();
    }, 500);

    // The WebUI's own progress bar, on the tab where the work was begun
    function follow() {
        const shown = status();
        if (!shown || shown.dataset.live !== "1" || following === shown.dataset.task) return;
        const container = find(shown.dataset.kind === "comparison" ? "spo_compare_progress" : "spo_progress");
        if (!container) return;
        following = shown.dataset.task;
        requestProgress(following, container, null, function() {
            setTimeout(function() {
                following = null;
                refresh();
            }, 500);
        });
    }

    // Lists of files are read anew when the server says that they may have changed
    function followLists() {
        const shown = status();
        if (!shown || !shown.dataset.lists || shown.dataset.lists === lists) return;
        lists = shown.dataset.lists;
        click("spo_lists");
    }

    function setField(id, value) {
        const box = gradioApp().querySelector("#" + id + " textarea, #" + id + " input[type=number], #" + id + " input");
        if (!box || value === undefined || value === "") return;
        box.value = value;
        updateInput(box);
    }

    // With an empty prompt, a picture of the run's own prompt and size; else the LoRA is added to what is there
    function sendToTxt2img() {
        const shown = status();
        const box = gradioApp().querySelector("#txt2img_prompt textarea");
        if (!shown || !shown.dataset.lora || !box) return;
        const { lora, prompt, negative, width, height, steps, cfg } = shown.dataset;
        if (!box.value.trim()) {
            box.value = prompt || "";
            setField("txt2img_neg_prompt", negative);
            setField("txt2img_width", width);
            setField("txt2img_height", height);
            setField("txt2img_steps", steps);
            setField("txt2img_cfg_scale", cfg);
        }
        if (!box.value.includes("<lora:" + lora + ":")) box.value = (box.value.trim() + " <lora:" + lora + ":1>").trim();
        updateInput(box);
        switch_to_txt2img();
    }

    function switchTo(id) {
        const tabs = [...gradioApp().querySelectorAll("#spo_tabs > .tabitem")];
        const buttons = gradioApp().querySelectorAll("#spo_tabs > .tab-nav button");
        const number = tabs.findIndex((tab) => tab.id === id);
        if (buttons[number]) buttons[number].click();
    }

    window.spo_send_to_txt2img = sendToTxt2img;
    window.spo_refresh_now = refresh;
    window.spo_to_compare = function() {
        switchTo("spo_tab_compare");
        return [];
    };
    window.spo_to_vote = function(...given) {
        switchTo("spo_tab_preference");
        return given;
    };
    window.spo_follow = function() {
        refresh();
        switchTo("spo_tab_train");
    };
    window.spo_confirm_delete = function(name, all) {
        return confirm(all ? "Delete the run and its LoRA files?" : "Delete the run? Its LoRA files stay.") ? [name, all] : ["", all];
    };

    // ---- the newcomer's box: hidden once, hidden for ever in this browser

    window.spo_hide_newcomer = function() {
        localStorage.setItem("spo_newcomer", "hidden");
        hideNewcomer();
    };

    function hideNewcomer() {
        const box = find("spo_newcomer");
        if (box && localStorage.getItem("spo_newcomer") === "hidden") box.style.display = "none";
    }

    window.spo_try_demo = function() {
        tryingDemo = true;
        return [];
    };

    // The server chose the demo checkpoint; the list at the top of the page is to say so, too
    function followDemo() {
        const shown = status();
        const title = shown ? shown.dataset.checkpoint : "";
        if (!tryingDemo || !title || !title.startsWith("spo-demo") || shown.dataset.phase === "waiting") return;
        tryingDemo = false;
        click("refresh_sd_model_checkpoint");
        setTimeout(function() {
            selectCheckpoint(title);
        }, 1500);
    }

    // ---- pictures look large when they are clicked; Escape or a click closes

    function zoomed() {
        let dialog = document.getElementById("spo_large");
        if (!dialog) {
            dialog = document.createElement("dialog");
            dialog.id = "spo_large";
            dialog.setAttribute("aria-label", "Large picture");
            dialog.addEventListener("click", function() {
                dialog.close();
            });
            dialog.addEventListener("keydown", function(event) {
                if (event.key !== "Escape") return;
                event.stopPropagation(); // the WebUI's own pictures would be closed, which need not be there
                dialog.close();
            });
            document.body.append(dialog);
        }
        return dialog;
    }

    document.addEventListener("click", function(event) {
        const button = event.composedPath().find((one) => one.classList && one.classList.contains("spo-zoom"));
        if (!button) return;
        const row = button.closest(".spo-together");
        const pictures = row ? [...row.querySelectorAll(".spo-zoom img")] : [button.querySelector("img")];
        const dialog = zoomed();
        dialog.replaceChildren(...pictures.map(function(picture) {
            const large = document.createElement("img");
            large.src = picture.src;
            large.alt = picture.alt;
            return large;
        }));
        dialog.showModal();
    });

    // ---- voting: the next pair is fetched when it is ready; keys vote

    // Of two pictures a key says which is better; of four the first number, or click, is the best, the second the worst
    let best = null; // [id of the pool, number]
    let chosen = ["", ""];

    function choose(shown, number) {
        const buttons = [...shown.querySelectorAll(".spo-pick")];
        if (!buttons[number]) return;
        if (!best || best[0] !== shown.dataset.pair) {
            best = [shown.dataset.pair, number];
            buttons[number].setAttribute("aria-pressed", "true");
            shown.querySelector(".spo-vote-ask").textContent = "And which is the worst? (The best again: take it back.)";
        } else if (best[1] === number) {
            best = null;
            buttons[number].setAttribute("aria-pressed", "false");
            shown.querySelector(".spo-vote-ask").textContent = "Which is the best? Click it, or press its number.";
        } else {
            chosen = [shown.dataset.pair, best[1] + "," + number];
            best = null;
            click("spo_vote_choose");
        }
    }

    document.addEventListener("click", function(event) {
        const pressed = event.composedPath().find((one) => one.classList && one.classList.contains("spo-pick"));
        const shown = votePair();
        if (pressed && shown) choose(shown, Number(pressed.dataset.number));
    });

    // ---- earlier votes: a click on a picture, on Tie or on Skip is the vote's new answer

    let changed = ["", ""];

    function wallIds() {
        return [...gradioApp().querySelectorAll("#spo_vote_wall figure")].map((one) => one.dataset.vote);
    }

    document.addEventListener("click", function(event) {
        const pressed = event.composedPath().find((one) => one.classList && one.classList.contains("spo-change"));
        if (!pressed) return;
        changed = [(wallIds()[0] || "") + "," + pressed.dataset.vote, pressed.dataset.answer];
        click("spo_vote_change");
    });

    window.spo_vote_chosen = () => chosen;
    window.spo_vote_changed = (folder) => [folder, ...changed];
    window.spo_vote_oldest = (folder) => [folder, wallIds().pop() || ""];

    const VOTE_KEYS = {
        ArrowLeft: "spo_vote_left", ArrowRight: "spo_vote_right", ArrowUp: "spo_vote_tie", ArrowDown: "spo_vote_skip",
        Backspace: "spo_vote_undo"
    };

    function votePair() {
        const shown = gradioApp().querySelector("#spo_vote_pair .spo-vote");
        return shown && shown.offsetParent !== null ? shown : null;
    }

    setInterval(function() {
        const shown = votePair();
        if (shown && shown.dataset.ready === "0" && !document.hidden) click("spo_vote_refresh");
    }, 700);

    document.addEventListener("keydown", function(event) {
        const shown = votePair();
        const target = event.composedPath()[0];
        const typing = target && /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
        if (!shown || typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
        if (/^[1-8]$/.test(event.key) && shown.querySelector(".spo-pick")) {
            event.preventDefault();
            choose(shown, Number(event.key) - 1);
            return;
        }
        const button = VOTE_KEYS[event.key] && find(VOTE_KEYS[event.key]);
        if (!button || (!shown.dataset.pair && event.key !== "Backspace")) return;
        event.preventDefault();
        button.click();
    });

    window.spo_vote_seen = function() {
        const shown = votePair();
        return [shown ? shown.dataset.pair : ""];
    };

    // ---- preset and preference model follow the checkpoint at the top of the page; loading it takes a while, so the
    // server is asked until it has the one that is named there

    let asked = null;

    function chosenCheckpoint() {
        const box = gradioApp().querySelector("#setting_sd_model_checkpoint input, .model_selection input"); // or Forge's
        return box ? box.value : "";
    }

    // "folder/name.safetensors [hash]" and "name [hash]" are both "name"
    function stem(title) {
        return title.split(/[\\/]/).pop().replace(/\s*\[[^\]]*\]\s*$/, "").replace(/\.(safetensors|ckpt)$/, "");
    }

    function askUntilLoaded(checkpoint, times) {
        const filled = gradioApp().querySelector("#spo_filled textarea, #spo_filled input");
        const file = filled ? filled.value.split("|").slice(3).join("|") : "";
        if (checkpoint !== chosenCheckpoint() || times <= 0 || stem(file) === stem(checkpoint)) return;
        click("spo_hello");
        setTimeout(function() {
            askUntilLoaded(checkpoint, times - 1);
        }, 3000);
    }

    function followCheckpoint() {
        const checkpoint = chosenCheckpoint();
        if (checkpoint === asked) return;
        asked = checkpoint;
        setTimeout(function() {
            askUntilLoaded(checkpoint, 100);
        }, 1000);
    }

    // gradio's sliders have two inputs and a label for neither
    function nameSliders() {
        for (const slider of gradioApp().querySelectorAll("#tab_spo .gradio-slider")) {
            const label = slider.querySelector("label span");
            for (const input of slider.querySelectorAll("input:not([aria-label])")) {
                if (label) input.setAttribute("aria-label", label.textContent.trim());
            }
        }
    }

    onUiLoaded(function() {
        hideNewcomer();
        nameSliders();
        setTimeout(function() {
            click("spo_hello");
            refresh();
        }, 300);
        gradioApp().querySelector("#tabs").addEventListener("click", function() {
            setTimeout(function() {
                if (visible() && Date.now() - lastRefresh >= REFRESH_MS) refresh();
            }, 100);
        });
    });
    onAfterUiUpdate(function() {
        hideNewcomer();
        followCheckpoint();
        follow();
        followLists();
        followDemo();
    });
})();
