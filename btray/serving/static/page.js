"use strict";
// The page of a btray service: sends chosen scans to /v1/classify and shows what comes back. Text only ever becomes
// text nodes; nothing of a file's name or an answer is read as HTML.

const AT_A_TIME = 2;
const TRIES = 8;
const byId = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(1) + " %";
let key = "";

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function say(text) {
  byId("status").textContent = text;
}

// The field is shown and focused at once, and what is wrong is announced: also after a key that is not known.
function askForKey() {
  const field = byId("key");
  byId("key-form").hidden = false;
  field.setAttribute("aria-invalid", String(key !== ""));
  say(key ? "The service does not know this key." : "This service asks for an API key.");
  if (document.activeElement !== field) field.focus();
}

class Refused extends Error {
  constructor(code, detail) {
    super(detail);
    this.code = code;
  }
}

// The answer as JSON; waits while the service is busy, and asks for a key if it needs one.
async function ask(path, options = {}) {
  for (let tries = 1; ; tries++) {
    const headers = key ? { Authorization: "Bearer " + key } : {};
    const answer = await fetch(path, { ...options, headers });
    if (answer.ok) return answer.json();
    if (answer.status === 401) askForKey();
    const pause = Number(answer.headers.get("Retry-After"));
    if ((answer.status === 429 || answer.status === 503) && pause > 0 && tries < TRIES) {
      await new Promise((resume) => setTimeout(resume, 1000 * Math.min(pause, 10)));
      continue;
    }
    const problem = await answer.json().catch(() => ({}));
    throw new Refused(problem.code || "error", problem.detail || "the service answered " + answer.status);
  }
}

// ---- the model

function figure(title, accuracy, how) {
  const box = element("div", title, "figure");
  const known = accuracy && accuracy.value !== null;
  box.append(element("b", known ? percent(accuracy.value) : "not measured"));
  const interval = known && accuracy.ci95 ? " 95 % interval " + accuracy.ci95.map(percent).join(" to ") + "." : "";
  const count = accuracy && accuracy.images !== null ? ` On ${accuracy.images} images.` : "";
  box.append(element("small", how + count + interval));
  return box;
}

function showModel(model) {
  const parts = document.createDocumentFragment();
  const line = element("p");
  line.append(element("strong", model.name), " ", element("code", model.model_id));
  if (model.role === "canary") line.append(` (on trial, answers ${percent(model.share)} of the requests)`);
  parts.append(line);
  const figures = element("div", undefined, "figures");
  figures.append(
    figure("Accuracy on clean images", model.clean_accuracy, "Test images with no twin in the training data: the figure to believe."),
    figure("Accuracy as published", model.accuracy, "All test images; twins in the training data would make it look better."),
  );
  parts.append(figures);
  const abstains = model.abstain_below === null ? "never abstains" : "abstains below " + percent(model.abstain_below);
  const unlike = model.detects_out_of_distribution ? "recognizes" : "cannot recognize";
  parts.append(element("p", `Knows ${model.classes.join(", ")}; ${abstains}; ${unlike} images unlike those it was ` +
    `trained on. Made ${model.created_at.slice(0, 10)}.`, "how"));
  return parts;
}

async function loadModel() {
  const section = byId("model");
  try {
    const content = await ask("v1/models");
    section.replaceChildren(element("h2", "The model"), ...content.models.map(showModel));
    if (!byId("key-form").hidden) say("The key is accepted.");
    byId("key").removeAttribute("aria-invalid");
    byId("key-form").hidden = true;
  } catch (error) {
    const text = error.code === "unauthorized" ? "It is shown to those who have a key." : error.message;
    section.replaceChildren(element("h2", "The model"), element("p", text));
  }
}

// ---- scans

let cards = 0;

function newCard(title) {
  const card = byId("card").content.firstElementChild.cloneNode(true);
  const heading = card.querySelector("h3");
  heading.textContent = title;
  heading.id = `scan-${++cards}`;
  card.setAttribute("aria-labelledby", heading.id);
  card.querySelector(".bars").setAttribute("aria-label", "Calibrated probabilities of " + title);
  card.querySelector(".slider input").setAttribute("aria-label", "Heat map over " + title);
  card.querySelector(".columns").classList.add("alone");
  return card;
}

function mark(card, kind, title, text) {
  const place = element("p", undefined, kind === "doubtful" ? "mark doubtful" : "mark");
  place.append(element("strong", title), element("span", text));
  card.querySelector(".columns").before(place);
}

function refuse(card, text) {
  mark(card, "bad", "Not classified", text);
  card.querySelector(".columns").remove();
}

function showPictures(card, explanation, name) {
  if (!explanation) return;
  card.querySelector("figure").hidden = false;
  card.querySelector(".columns").classList.remove("alone");
  const heat = card.querySelector(".heat");
  const slider = card.querySelector(".slider input");
  card.querySelector(".slice").src = "data:image/png;base64," + explanation.slice_png;
  card.querySelector(".slice").alt = "Slice of " + name;
  heat.src = "data:image/png;base64," + explanation.heat_png;
  heat.alt = "Heat map for " + explanation.label;
  const set = () => {
    heat.style.opacity = String(slider.value / 100);
    card.querySelector("output").textContent = slider.value + " %";
  };
  slider.addEventListener("input", set);
  set();
}

function showAnswer(card, answer, name) {
  if (answer.status !== "ok") {
    refuse(card, `${answer.error_code}: ${answer.error}`);
    return;
  }
  const label = card.querySelector(".label");
  if (answer.out_of_distribution) {
    mark(card, "bad", "Unlike the training images", "The model was not made for such an image: do not rely on its answer.");
  }
  if (answer.abstained) {
    mark(card, "doubtful", "The model abstains", "Its confidence is below the threshold: what follows is a guess.");
  }
  label.textContent = (answer.abstained || answer.out_of_distribution ? "Perhaps " : "") + answer.label + " ";
  label.append(element("small", percent(answer.confidence)));
  if (answer.label_set.length > 1) {
    const doubt = card.querySelector(".doubt");
    doubt.hidden = false;
    doubt.textContent = "Cannot be ruled out: " + answer.label_set.join(", ");
  }
  for (const [name, share] of Object.entries(answer.probabilities)) {
    const item = element("li");
    const text = element("div", undefined, "text");
    text.append(element("span", name), element("span", percent(share)));
    const track = element("div", undefined, "track");
    track.setAttribute("aria-hidden", "true");
    track.append(element("i"));
    track.firstChild.style.width = percent(share).replace(" ", "");
    item.append(text, track);
    card.querySelector(".bars").append(item);
  }
  const unusual = answer.ood_score === null ? "" : ` Unusualness ${answer.ood_score.toFixed(2)}, about 1 for training images.`;
  card.querySelector(".answer .how").textContent = `Calibrated probabilities.${unusual} Model ${answer.model_id.slice(0, 12)}.`;
  if (!answer.explanation) card.querySelector(".answer .how").append(" No heat map: the file has too many pages for that.");
  showPictures(card, answer.explanation, name);
}

async function classify(file, place) {
  const body = new FormData();
  body.append("images", file, file.name);
  try {
    const options = { method: "POST", body };
    const content = await ask("v1/classify?explain=true", options).catch((error) => {
      if (error.code !== "too_many_explanations") throw error;
      return ask("v1/classify", options); // a file of so many pages has labels and no pictures
    });
    const cards = content.results.map((answer) => {
      const title = content.results.length > 1 ? `${file.name}, page ${answer.frame + 1}` : file.name;
      const card = newCard(title);
      showAnswer(card, answer, title);
      return card;
    });
    place.replaceWith(...cards);
    return "";
  } catch (error) {
    const card = newCard(file.name);
    refuse(card, error instanceof Refused ? `${error.code}: ${error.message}` : "The service cannot be reached.");
    place.replaceWith(card);
    return error.code || "unreachable";
  }
}

async function classifyAll(files) {
  const waiting = [...files].map((file) => {
    const place = newCard(file.name);
    place.querySelector(".label").textContent = "…";
    return [file, place];
  });
  if (!waiting.length) return;
  byId("results").prepend(...waiting.map(([, place]) => place));
  const total = waiting.length;
  let done = 0;
  let good = 0;
  let denied = false;
  say(`Classifying ${total} ${total === 1 ? "scan" : "scans"}…`);
  const work = async () => {
    while (waiting.length) {
      const [file, place] = waiting.shift();
      const trouble = await classify(file, place);
      if (!trouble) good++;
      if (trouble === "unauthorized") denied = true;
      done++;
      say(`${done} of ${total} done`);
    }
  };
  await Promise.all(Array.from({ length: AT_A_TIME }, work));
  say(`${good} of ${total} ${total === 1 ? "scan" : "scans"} classified.` +
    (denied ? " The service needs another key." : ""));
}

// ---- the page

const drop = byId("drop");
byId("files").addEventListener("change", (event) => {
  classifyAll(event.target.files);
  event.target.value = "";
});
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  classifyAll(event.dataTransfer.files);
});
// A scan dropped beside the field must not replace the page.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  loadModel();
});
loadModel();
