"use strict";

// The SPO tab's page side: follow the work that is going on, send a LoRA to txt2img. Everything else is the server's.
(function() {
    const REFRESH_MS = 1500;
    let following = null;
    let lastRefresh = 0;

    function find(id) {
        return gradioApp().getElementById(id);
    }

    function status() {
        return gradioApp().querySelector("#spo_status .spo-status");
    }

    function visible() {
        const tab = find("tab_spo");
        return Boolean(tab) && tab.offsetParent !== null && !document.hidden;
    }

    function refresh(force) {
        const button = find("spo_refresh");
        const now = Date.now();
        if (button && (force || (visible() && now - lastRefresh >= REFRESH_MS))) {
            lastRefresh = now;
            button.click();
        }
    }

    function follow() {
        const shown = status();
        if (!shown || shown.dataset.live !== "1" || following === shown.dataset.task) return;
        const container = find(shown.dataset.kind === "comparison" ? "spo_compare_progress" : "spo_progress");
        if (!container) return;
        const task = shown.dataset.task;
        following = task;
        if (shown.dataset.kind === "download") { // not in the WebUI's queue, so its progress knows nothing of it
            const timer = setInterval(function() {
                const now = status();
                if (now && now.dataset.task === task && now.dataset.live === "1") {
                    refresh(false);
                } else {
                    clearInterval(timer);
                    following = null;
                }
            }, 1000);
            return;
        }
        requestProgress(task, container, null, function() {
            setTimeout(function() {
                following = null;
                refresh(true);
            }, 500);
        }, function() {
            refresh(false);
        });
    }

    // The Compare tab shows a comparison's status, too: one job, one status, on the tab where it was begun.
    function mirror() {
        const shown = status();
        const place = find("spo_compare_status");
        if (!shown || !place || shown.dataset.kind !== "comparison") return;
        const inner = place.querySelector(".prose") || place;
        const version = shown.dataset.task + " " + shown.dataset.version;
        if (inner.dataset.shown === version) return;
        inner.dataset.shown = version;
        const copy = shown.cloneNode(true);
        copy.classList.add("spo-mirror");
        inner.replaceChildren(copy);
    }

    function sendToTxt2img() {
        const shown = status();
        const box = gradioApp().querySelector("#txt2img_prompt textarea");
        const name = shown ? shown.dataset.lora : "";
        if (!name || !box) return;
        const tag = "<lora:" + name + ":1>";
        if (!box.value.includes("<lora:" + name + ":")) {
            box.value = (box.value.trim() + " " + tag).trim();
            updateInput(box);
        }
        switch_to_txt2img();
    }

    function switchTo(number) {
        const tabs = gradioApp().querySelectorAll("#spo_tabs > .tab-nav button");
        if (tabs[number]) tabs[number].click();
    }

    window.spo_send_to_txt2img = sendToTxt2img;
    window.spo_to_compare = function(prompts) {
        switchTo(2);
        return [prompts];
    };
    // ---- voting: the next pair is fetched when it is ready; keys vote

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
        const button = find("spo_vote_refresh");
        if (shown && button && shown.dataset.ready === "0" && !document.hidden) button.click();
    }, 700);

    document.addEventListener("keydown", function(event) {
        const shown = votePair();
        const target = event.composedPath()[0];
        const typing = target && /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
        if (!shown || typing || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
        const button = VOTE_KEYS[event.key] && find(VOTE_KEYS[event.key]);
        if (!button || (!shown.dataset.pair && event.key !== "Backspace")) return;
        event.preventDefault();
        button.click();
    });

    window.spo_vote_seen = function() {
        const shown = votePair();
        return [shown ? shown.dataset.pair : ""];
    };
    window.spo_refresh_now = function() {
        refresh(true);
    };
    window.spo_follow = function() {
        refresh(true);
        switchTo(0);
    };
    window.spo_confirm_delete = function(name, all) {
        return confirm(all ? "Delete the run and its LoRA files?" : "Delete the run? Its LoRA files stay.") ? [name, all] : ["", all];
    };

    // The preset and the preference model follow the checkpoint at the top of the page; loading it takes a while, so
    // the server is asked until it has the one that is named there.
    let asked = null;

    function chosenCheckpoint() {
        const box = gradioApp().querySelector("#setting_sd_model_checkpoint input");
        return box ? box.value : "";
    }

    // "folder/name.safetensors [hash]" and "name [hash]" are both "name"
    function stem(title) {
        return title.split(/[\\/]/).pop().replace(/\s*\[[^\]]*\]\s*$/, "").replace(/\.(safetensors|ckpt)$/, "");
    }

    function askUntilLoaded(checkpoint, times) {
        const filled = gradioApp().querySelector("#spo_filled textarea, #spo_filled input");
        const file = filled ? filled.value.split("|")[2] : "";
        if (checkpoint !== chosenCheckpoint() || times <= 0 || stem(file) === stem(checkpoint)) return;
        const hello = find("spo_hello");
        if (hello) hello.click();
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

    onUiLoaded(function() {
        setTimeout(function() {
            const hello = find("spo_hello");
            if (hello) hello.click();
        }, 300);
        gradioApp().querySelector("#tabs").addEventListener("click", function() {
            setTimeout(function() {
                refresh(false);
            }, 100);
        });
    });
    onAfterUiUpdate(function() {
        followCheckpoint();
        follow();
        mirror();
    });
})();
