"use strict";
// A study: its answer, and a viewer for each of its series. UIDs tell series apart, and are shown nowhere.

import { post } from "./api.js";
import { Viewer, cardOf, count, doubts, element, percent, showLabel } from "./viewer.js";

let studies = 0;

// Key of the study that an answer belongs to, if it is a slice of one: a file that names none is one of its own.
export function studyOf(answer, file) {
  if (answer.study_uid || answer.series_uid) return answer.study_uid || "series " + answer.series_uid;
  return answer.position_mm === undefined ? null : "file " + file;
}

export function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) || []), item]);
  return groups;
}

function titleOf({ modality, plane, sequence, contrast, image_kind: kind }) {
  const weighting = sequence && sequence !== "other" ? sequence.toUpperCase() : "";
  const facts = [modality, plane, weighting, contrast && contrast + " contrast", kind !== "original" && kind];
  return facts.filter(Boolean).join(" ");
}

export class Study {
  constructor(title) {
    this.card = cardOf("study", title || `Study ${++studies}`);
    this.series = new Map(); // UID -> its viewer, if a slice was classified, and rejected files
  }

  seriesOf(answer) {
    const uid = answer.series_uid || "";
    if (!this.series.has(uid)) this.series.set(uid, { viewer: null, rejected: 0 });
    return this.series.get(uid);
  }

  add(slices) {
    for (const [series, some] of grouped(slices, ({ answer }) => this.seriesOf(answer))) {
      if (!series.viewer) {
        const facts = titleOf(some[0].answer);
        const number = `Series ${this.card.querySelectorAll(".card").length + 1}`;
        series.viewer = new Viewer(facts ? `${number}: ${facts}` : number, true);
        this.card.append(series.viewer.card);
      }
      series.viewer.add(some);
    }
  }

  // The service decides by the rule of the model: frames in, answers for the series and the study out.
  async decide(model) {
    const frames = [];
    const slices = [];
    const all = [...this.series.values()];
    all.forEach(({ viewer, rejected }, number) => {
      const of = { model_id: model, study_uid: "study", series_uid: String(number) };
      for (const slice of viewer?.slices || []) {
        const { probabilities, abstained, out_of_distribution } = slice.answer;
        frames.push({ ...of, probabilities, abstained, out_of_distribution });
        slices.push(slice);
      }
      for (let left = rejected; left > 0; left--) frames.push({ ...of, status: "rejected" });
      slices.length = frames.length;
    });
    const decision = await post("v1/studies", { frames });
    const viewers = all.map(({ viewer }) => viewer);
    for (const result of decision.results) {
      if (result.level === "study") this.show(result, decision);
      else viewers[result.series_uid]?.mark(result.key_frames.map((number) => slices[number]));
    }
    const ofSeries = decision.results.filter(({ level, label }) => level === "series" && label);
    if (ofSeries.length < 2) return;
    for (const { series_uid: number, label, confidence, agreement, frames } of ofSeries) {
      const line = `${count(frames, "slice")}: ${label} ${percent(confidence)}, as ${percent(agreement)} of them say.`;
      viewers[number].card.querySelector("h3").after(element("p", line, "how"));
    }
  }

  show(answer, { rule, model_id: model }) {
    const place = this.card.querySelector(".verdict");
    place.hidden = false;
    if (answer.label === null) {
      place.querySelector(".label").textContent = "No slice could be classified";
    } else {
      place.prepend(...doubts(answer));
      showLabel(place.querySelector(".label"), answer);
    }
    const unlike = answer.ood_frames && `${count(answer.ood_frames, "slice is", "slices are")} unlike the training images`;
    const facts = {
      Rule: rule,
      Agreement: answer.agreement !== null && `${percent(answer.agreement)} of the slices have this label`,
      Slices: `${answer.frames} in ${this.series.size} series`,
      Doubts: [answer.abstained_frames && `the model abstains on ${count(answer.abstained_frames, "slice")}`, unlike].filter(Boolean).join("; "),
      Rejected: answer.rejected && count(answer.rejected, "file"),
      Model: model.slice(0, 12),
    };
    for (const [name, value] of Object.entries(facts)) {
      if (value) place.querySelector("dl").append(element("dt", name), element("dd", value));
    }
  }
}
