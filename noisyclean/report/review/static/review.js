"use strict";
// Shows one pair at a time and sends what is said of it. What comes from the corpus is only ever set as text.
const get = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const count = (number) => number.toLocaleString("en");
const buttons = [...document.querySelectorAll("[data-key]")];
let pair = null;
let certified = null;
let busy; // also until the picture is there: nobody judges what is not yet seen

async function ask(path, method = "GET") {
  const answer = await fetch(path, { method }).catch(() => {
    throw new Error("No answer: noisyclean review has ended. Repeat the command, and open its new address.");
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function setBusy(now) {
  busy = now;
  get("main").ariaBusy = String(now);
}

async function work(task) {
  setBusy(true);
  get("error").hidden = true;
  try {
    await task();
  } catch (error) {
    get("error").textContent = error.message;
    get("error").hidden = false;
  }
  setBusy(false);
}

async function show(state) {
  pair = state.pair;
  get("pair").hidden = !pair;
  get("done").hidden = Boolean(pair);
  for (const one of buttons) one.disabled = one.id === "back" ? !state.back : !pair;
  get("progress").textContent = `${count(state.judged)} of ${count(state.drawn)} pairs judged`;
  get("bar").max = state.drawn;
  get("bar").value = state.judged;
  showClean(state.clean);
  get("unsure").hidden = !state.unsure;
  get("unsure").textContent =
    `Pairs of which you could not say: ${count(state.unsure)}. The figures leave them out, and flatter if these are the bad ones.`;
  get("skipped").hidden = !state.skipped.length;
  get("skipped").querySelector("summary").textContent = `${count(state.skipped.length)} skipped: no picture to be had`;
  get("skipped").querySelector("ul").replaceChildren(
    ...state.skipped.map((why) => Object.assign(document.createElement("li"), { textContent: why })),
  );
  if (pair) {
    get("caption").textContent = pair.caption ?? "(no caption)";
    get("picture").src = `picture/${pair.name}`;
    await get("picture").decode();
  }
}

function showClean(clean) {
  const strong = document.createElement("strong");
  const { labelled, matched, interval, more } = clean;
  if (!labelled) {
    get("precision").textContent = clean.pairs ? "None of its pairs is labelled yet." : "There are no clean pairs.";
    get("more").textContent = "";
    return;
  }
  strong.textContent = percent(matched / labelled);
  get("precision").replaceChildren(
    strong,
    ` match: ${count(matched)} of ${count(labelled)} labelled. 95\u00a0% interval ${percent(interval[0])} to ${percent(interval[1])}.`,
  );
  get("more").textContent = more
    ? `Label ${count(more)} more of its ${count(clean.pairs)} pairs to know it within ±2 points.`
    : "This is known within ±2 points.";
}

// What can be certified takes the whole manifest to say: asked for in a pause, and one at a time.
let pause;
let calibrating = false;
function calibrateSoon() {
  clearTimeout(pause);
  pause = setTimeout(calibrate, 500);
}

async function calibrate() {
  if (calibrating) {
    calibrateSoon();
    return;
  }
  calibrating = true;
  try {
    showCertificate(await ask("calibration"));
  } catch (error) {
    showCertificate(null, error.message);
  }
  calibrating = false;
}

function showCertificate(found, trouble) {
  certified = found?.cutoff ?? null;
  get("redraw").hidden = !certified;
  if (!found) {
    get("certificate").textContent = trouble ?? "Nothing yet.";
    return;
  }
  const goal = `to hold at most ${percent(found.target)} mismatches`;
  if (certified) {
    get("certificate").textContent =
      `The best ${percent(certified.keep)} of the readable pairs, ${count(certified.rank)}, are certified ${goal}.`;
  } else if (found.labels_needed) {
    get("certificate").textContent =
      `No part can be certified ${goal} yet. If the rates stay as they are, some ${count(found.labels_needed)} labels a split would do.`;
  } else {
    get("certificate").textContent = `No part can be certified ${goal}, and more labels will not help.`;
  }
}

async function redraw() {
  const { keep, rank } = certified;
  const question =
    `Redraw the split, so that the best ${percent(keep)} of the readable pairs (${count(rank)}) are clean?\n\n` +
    "A new sample is drawn from the new split. The labels so far are kept in a file of their own.";
  if (busy || !confirm(question)) return;
  await work(async () => {
    get("redraw").disabled = true;
    try {
      await ask(`redraw/${keep}`, "POST");
      await show(await ask("state"));
    } finally {
      get("redraw").disabled = false;
    }
  });
  calibrateSoon();
}

async function answer(button) {
  if (busy || button.disabled) return;
  const path = button.id === "back" ? "back" : `judge/${pair.name}/${button.dataset.verdict}`;
  await work(async () => show(await ask(path, "POST")));
  calibrateSoon();
}

for (const one of buttons) one.addEventListener("click", () => answer(one));
get("redraw").addEventListener("click", redraw);
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key === "Backspace" ? "b" : event.key.toLowerCase();
  const button = buttons.find((one) => one.dataset.key === key);
  if (!button) return;
  event.preventDefault();
  answer(button);
});
work(async () => show(await ask("state")));
calibrate();
