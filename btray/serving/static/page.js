"use strict";
// The page of a btray service: sends chosen scans to /v1/classify and shows what comes back, the slices of a series in
// one viewer. Names of files stay on this machine.

import { Refused, ask, hasKey, useKey, whenKeyIsNeeded } from "./api.js";
import { Study, grouped, studyOf } from "./studies.js";
import { Viewer, byId, count, element, percent, refusal } from "./viewer.js";

const AT_A_TIME = 2; // requests
const BATCH = { files: 16, bytes: 8e6 }; // of one request; where the service takes less, halves are sent
const FEW = 8; // files, each with a card of its own if it cannot be classified

function say(text) {
  byId("status").textContent = text;
}

// The field is shown and focused at once, and what is wrong is announced: also after a key that is not known.
whenKeyIsNeeded(() => {
  const field = byId("key");
  byId("key-form").hidden = false;
  field.setAttribute("aria-invalid", String(hasKey()));
  say(hasKey() ? "The service does not know this key." : "This service asks for an API key.");
  if (document.activeElement !== field) field.focus();
});

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

class ModelIsGone extends Error {}

// The files that were chosen together: classified in batches by one model, and shown as they come.
class Run {
  // `files`: each a File, and the path that it is named by
  constructor(files) {
    this.files = files.sort((one, other) => one.path.localeCompare(other.path, undefined, { numeric: true }));
    this.place = element("div");
    this.series = element("div");
    this.pictures = element("div");
    this.place.append(this.series, this.pictures);
    this.studies = new Map();
    this.model = null;
    this.done = this.good = 0;
    this.denied = false;
    this.reasons = [];
  }

  async classify() {
    byId("results").prepend(this.place);
    this.report();
    const batches = await this.batches();
    while (batches.length && !this.model) await this.send(batches.shift());
    const work = async () => {
      while (batches.length && this.place.isConnected) await this.send(batches.shift());
    };
    await Promise.all(Array.from({ length: AT_A_TIME }, work));
    for (const study of this.studies.values()) await this.decide(study);
    if (this.reasons.length) {
      const title = `${count(this.reasons.length, "file")} not classified`;
      this.place.append(refusal(title, this.reasons));
    }
    byId("progress").hidden = true;
    const total = count(this.files.length, "scan");
    say(`${this.good} of ${total} classified.${this.denied ? " The service needs another key." : ""}`);
  }

  report() {
    if (!this.place.isConnected) return; // another run took its place
    const progress = byId("progress");
    progress.hidden = false;
    progress.max = this.files.length;
    progress.value = this.done;
    say(this.done ? `${this.done} of ${this.files.length} done` : `Classifying ${count(this.files.length, "scan")}…`);
  }

  async batches() {
    const batches = [];
    let bytes = Infinity;
    for (const [number, { file }] of this.files.entries()) {
      try {
        await file.slice(0, 1).arrayBuffer(); // one that cannot be read would fail a whole request
      } catch {
        this.refuse(number, "unreadable", "the browser cannot read this file");
        this.done++;
        continue;
      }
      bytes += file.size;
      if (bytes > BATCH.bytes || batches.at(-1).length === BATCH.files) {
        batches.push([]);
        bytes = file.size;
      }
      batches.at(-1).push(number);
    }
    return batches;
  }

  async send(batch) {
    const options = new URLSearchParams({ explain: true, each: true });
    if (batch.length === 1) options.set("first_frame", 0);
    const body = new FormData();
    for (const number of batch) body.append("images", this.files[number].file, "scan");
    const good = new Set();
    try {
      for (;;) {
        if (this.model) options.set("model_id", this.model);
        const content = await ask("v1/classify?" + options, { method: "POST", body });
        this.model = content.model_id;
        for (const file of this.take(batch, content)) good.add(file);
        if (!content.next_frame) break;
        options.set("first_frame", content.next_frame);
      }
    } catch (error) {
      if (error.code === "not_found" && this.model) throw new ModelIsGone();
      if (error.status === 413 && batch.length > 1) {
        const half = Math.ceil(batch.length / 2);
        await this.send(batch.slice(0, half));
        return this.send(batch.slice(half));
      }
      if (!(error instanceof Refused)) throw error;
      if (error.code === "unauthorized") this.denied = true;
      for (const number of batch) this.refuse(number, error.code, error.message);
    }
    this.good += good.size;
    this.done += batch.length;
    this.report();
  }

  // Show answers; returns the files that have some.
  take(batch, content) {
    const shown = [];
    for (const { explanation: picture, ...answer } of content.results) {
      const file = batch[answer.index];
      const key = studyOf(answer, file);
      if (key && !this.studies.has(key)) this.studies.set(key, this.newStudy(key, file));
      if (answer.status === "ok") {
        shown.push({ answer, picture, file, study: this.studies.get(key) });
      } else {
        if (key) this.studies.get(key).seriesOf(answer).rejected++;
        this.refuse(file, answer.error_code, answer.error);
      }
    }
    for (const [study, some] of grouped(shown, (slice) => slice.study)) {
      if (study) study.add(some);
      else some.forEach((page) => this.showPage(page, content));
    }
    return shown.map(({ file }) => file);
  }

  showPage(page, { results, next_frame: more }) {
    const { frame, index } = page.answer;
    const single = frame === 0 && !more && results.filter((other) => other.index === index).length === 1;
    const viewer = new Viewer(this.files[page.file].file.name + (single ? "" : `, page ${frame + 1}`));
    viewer.add([page]);
    this.put(this.pictures, viewer.card, page.file);
  }

  newStudy(key, file) {
    const study = new Study(key.startsWith("file ") ? this.files[file].file.name : "");
    this.put(this.series, study.card, file);
    return study;
  }

  async decide(study) {
    try {
      await study.decide(this.model);
    } catch (error) {
      if (error.code === "not_found") throw new ModelIsGone();
      if (!(error instanceof Refused)) throw error;
      const reason = `No answer for the study: ${error.code}: ${error.message}`;
      study.card.querySelector("h2").after(element("p", reason, "mark"));
    }
  }

  refuse(number, code, detail) {
    const { path } = this.files[number];
    if (this.files.length > FEW) this.reasons.push(`${path}: ${code}: ${detail}`);
    else this.put(this.pictures, refusal(path, [`${code}: ${detail}`]), number);
  }

  // Cards stand in the order of their files, whichever comes first.
  put(place, card, number) {
    card.file = number;
    const after = [...place.children].find((other) => other.file > number);
    place.insertBefore(card, after || null);
  }
}

async function classifyAll(files, again = true) {
  const run = new Run(files);
  if (!run.files.length) return;
  try {
    await run.classify();
  } catch (error) {
    if (!(error instanceof ModelIsGone)) throw error;
    if (!again) return say("The service changes its model: try again. Nothing was classified.");
    run.place.remove(); // another model took over: slices of a study must not be judged by two
    await classifyAll(files, false);
  }
}

// ---- the page

const withPath = (file) => ({ file, path: file.webkitRelativePath || file.name });

// The files of what was dropped, those of folders one by one.
async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map(withPath);
  const files = [];
  const walk = async (entry) => {
    const add = (file) => files.push({ file, path: entry.fullPath.slice(1) });
    if (entry.isFile) {
      add(await new Promise((found) => entry.file(found, () => found(null))));
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((found) => reader.readEntries(found, () => found(null)));
      if (!some) add(null); // the folder itself is named as unreadable
      if (!some?.length) return;
      for (const inner of some) await walk(inner);
    }
  };
  for (const entry of entries) await walk(entry);
  return files;
}

const drop = byId("drop");
for (const input of [byId("files"), byId("folder")]) {
  input.addEventListener("change", () => {
    classifyAll([...input.files].map(withPath));
    input.value = "";
  });
}
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) drop.addEventListener(name, () => drop.classList.remove("over"));
drop.addEventListener("drop", async (event) => {
  event.preventDefault();
  classifyAll(await droppedFiles(event.dataTransfer));
});
// A scan dropped beside the field must not replace the page.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
  loadModel();
});
loadModel();
