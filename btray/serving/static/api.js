"use strict";
// Requests to the service, with the key that the user gave, and patience while it is busy.

const TRIES = 8;
let key = "";
let askForKey = () => {};

export class Refused extends Error {
  constructor(status, code, detail) {
    super(detail);
    this.status = status;
    this.code = code;
  }
}

export function useKey(given) {
  key = given;
}

export const hasKey = () => key !== "";

export function whenKeyIsNeeded(handler) {
  askForKey = handler;
}

// The answer as JSON. Throws Refused if there is none.
export async function ask(path, options = {}) {
  for (let tries = 1; ; tries++) {
    const headers = { ...options.headers, ...(key && { Authorization: "Bearer " + key }) };
    const answer = await fetch(path, { ...options, headers }).catch(() => {
      throw new Refused(0, "unreachable", "the service cannot be reached");
    });
    if (answer.ok) return answer.json();
    if (answer.status === 401) askForKey();
    const pause = Number(answer.headers.get("Retry-After"));
    if ((answer.status === 429 || answer.status === 503) && pause > 0 && tries < TRIES) {
      await new Promise((resume) => setTimeout(resume, 1000 * Math.min(pause, 10)));
      continue;
    }
    const problem = await answer.json().catch(() => ({}));
    const detail = problem.detail || "the service answered " + answer.status;
    throw new Refused(answer.status, problem.code || "error", detail);
  }
}

export const post = (path, content) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) });
