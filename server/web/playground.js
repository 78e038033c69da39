// Publishing by hand, and what goes over the wire of each transport, as it is.

import { $, el, write } from "./dom.js";
import { call } from "./session.js";
import { WIRES } from "./wire.js";

const LINES = 200; // of each wire
const LONGEST = 2000; // characters of a line
const STEP_MS = 400;

export function createPlayground() {
  const lanes = WIRES.map(createLane);
  $("wires").append(...lanes.map(({ lane }) => lane));
  let me = null;
  let playing = null;

  /** The update that the form says, as {jobId, update}. Throws an Error in words. */
  function read() {
    const form = new FormData($("publish"));
    const update = {};
    for (const name of ["userId", "kind", "status", "message"]) if (form.get(name)) update[name] = form.get(name);
    if (form.get("progress") !== "") update.progress = Number(form.get("progress"));
    const more = form.get("more").trim();
    if (more) {
      let fields;
      try {
        fields = JSON.parse(more);
      } catch (error) {
        throw new Error(`More fields: ${error.message}`);
      }
      if (fields === null || typeof fields !== "object" || Array.isArray(fields)) throw new Error("More fields: this is not a JSON object");
      Object.assign(update, fields);
    }
    return { jobId: form.get("jobId"), update };
  }

  async function publish(jobId, update) {
    try {
      const answer = await call(`api/v2/jobs/${encodeURIComponent(jobId)}/updates`, { method: "POST", body: update });
      say(`accepted: ${JSON.stringify(answer)}`);
      return true;
    } catch (error) {
      say(`${error.status || "not sent"}: ${error.code} ${error.message}`, true);
      return false;
    }
  }

  function say(text, bad = false) {
    write($("publish-answer"), text);
    $("publish-answer").classList.toggle("bad", bad);
  }

  async function submit() {
    try {
      const { jobId, update } = read();
      await publish(jobId, update);
    } catch (error) {
      say(error.message, true);
    }
  }

  /** A made-up job from its beginning to its end. */
  async function play() {
    if (playing) return stopPlaying();
    const mine = (playing = {});
    write($("publish-play"), "Stop playing");
    try {
      const { jobId, update } = read();
      const again = { attempt: (await call(`api/v2/jobs/${encodeURIComponent(jobId)}`).catch(() => null))?.attempt };
      if (again.attempt) again.attempt += 1;
      for (let done = 0; done <= 20 && playing === mine; done += 1) {
        const last = done === 20;
        const step = { ...update, ...again, status: last ? "completed" : "processing", progress: done * 5, stage: "play", steps: { done, total: 20 }, message: `step ${done} of 20` };
        if (!(await publish(jobId, step))) break;
        if (!last) await new Promise((resolve) => setTimeout(resolve, STEP_MS));
      }
    } catch (error) {
      say(error.message, true);
    }
    if (playing === mine) stopPlaying();
  }

  function stopPlaying() {
    playing = null;
    write($("publish-play"), "Play a whole job");
  }

  function drawAll() {
    write($("wire-all"), lanes.some((lane) => lane.running) ? "Stop all" : "Start all");
  }

  $("publish").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("publish-play").addEventListener("click", play);
  $("wire-all").addEventListener("click", () => {
    const stop = lanes.some((lane) => lane.running);
    for (const lane of lanes) if (lane.running === stop) lane.toggle();
  });
  $("wire-clear").addEventListener("click", () => lanes.forEach((lane) => lane.clear()));

  function createLane({ name, note, open }) {
    const log = el("ol", "wire-text");
    const toggle = el("button", "", "Start");
    const lane = el("section", "wire", el("div", "line", el("h3", "", name), el("span", "quiet", note), toggle), log);
    const pending = [];
    let close = null;
    let scheduled = false;
    toggle.type = "button";
    toggle.setAttribute("aria-label", `Start ${name}`);
    log.tabIndex = 0;
    log.setAttribute("aria-label", `${name}: what was sent and received`);
    toggle.addEventListener("click", () => api.toggle());

    // `way` is ">" for what we send, "<" for what comes, "" for what is neither.
    function tell(way, text) {
      pending.push([way, text]);
      if (pending.length > LINES) pending.shift();
      if (scheduled) return;
      scheduled = true;
      requestAnimationFrame(() => {
        scheduled = false;
        log.append(...pending.splice(0).map(line));
        while (log.children.length > LINES) log.firstElementChild.remove();
        log.scrollTop = 1e9;
      });
    }

    function line([way, text]) {
      const rest = text.length - LONGEST;
      const item = el("li", "", rest > 0 ? `${text.slice(0, LONGEST)} … ${rest} more characters` : text);
      item.dataset.way = way;
      return item;
    }

    const api = {
      lane,
      get running() {
        return close !== null;
      },
      toggle() {
        if (close) {
          close();
          close = null;
          tell("", "stopped");
        } else {
          const ids = $("wire-jobs").value.split(/[\s,]+/).filter(Boolean);
          let over = false;
          const stop = open(ids, tell, (why) => {
            if (over) return;
            over = true;
            close = null;
            tell("", why);
            api.draw();
          });
          close = () => {
            over = true;
            stop();
          };
        }
        api.draw();
      },
      clear: () => log.replaceChildren(),
      draw() {
        write(toggle, close ? "Stop" : "Start");
        toggle.setAttribute("aria-label", `${close ? "Stop" : "Start"} ${name}`);
        drawAll();
      },
      stop() {
        if (close) api.toggle();
        log.replaceChildren();
      },
    };
    return api;
  }

  return {
    /** Who publishes and watches; null stops everything. */
    use(who) {
      if (who && me && who.userId === me.userId && who.admin === me.admin) return;
      me = who;
      stopPlaying();
      for (const lane of lanes) lane.stop();
      if (!me) return;
      const allowed = me.can("publish");
      $("publish-why").hidden = allowed;
      write($("publish-why"), allowed ? "" : `To publish needs the capability “publish”, which ${me.userId} does not have.`);
      for (const control of $("publish").elements) control.disabled = !allowed;
      $("publish").elements.userId.value = me.userId;
    },
  };
}
