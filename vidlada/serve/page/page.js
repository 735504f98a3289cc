// The page: show videos and images, ask, watch the answer settle. No build step, nothing from elsewhere.

const element = (id) => document.getElementById(id);
const NAMES = ["A", "B"];
const TIME = /\b(?:(\d+):([0-5]\d)|(\d+(?:\.\d+)?) ?(?:s|sec|seconds?))(?!\w|\.\d)/g;
const SURE = 5; // colours of confidence
let media = []; // what is shown: { name, upload | url, seen, asked }
let turns = []; // { question, media, answer }
let sending = null; // AbortController of the upload under way
let running = null; // AbortController of the answer being made
let model = {};

function refreshButtons() {
  // a question must overtake neither its video nor the question before it
  element("ask").disabled = Boolean(sending || running);
  element("stop").disabled = !running;
  element("fresh").disabled = Boolean(running || !turns.length);
}

function make(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
}

function announce(text) {
  element("announce").textContent = text;
}

function report(error) {
  const box = element("error");
  box.hidden = !error;
  box.textContent = error ? `Sorry: ${error.message}` : "";
  if (error) box.scrollIntoView({ block: "nearest" });
}

// --- the server ---

function headers(extra = {}) {
  const key = element("key").value.trim();
  return key ? { Authorization: `Bearer ${key}`, ...extra } : extra;
}

function refusal(status, body) {
  if (status === 401) element("key-box").open = true;
  return new Error(body?.error?.message ?? `the server answered ${status}`);
}

async function failure(response) {
  return refusal(response.status, await response.json().catch(() => null));
}

// fetch, with words for a server that is gone
async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached; is it still running?");
  }
}

async function get(path, signal) {
  const response = await reach(path, { headers: headers(), signal });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// A file that no question will be asked about; where this fails, the server lets it expire.
function forget(file) {
  if (file) fetch(`v1/files/${file.id}`, { method: "DELETE", headers: headers() }).catch(() => {});
}

// XMLHttpRequest, because fetch does not tell how much has been sent.
function send(file, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "v1/files");
    request.responseType = "json"; // null where it is not JSON
    signal.addEventListener("abort", () => { request.abort(); reject(signal.reason); });
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Error("the upload failed; the file may be too large, or the server is gone"));
    request.onload = () => {
      if (request.status === 200 && request.response) resolve(request.response);
      else reject(refusal(request.status, request.response));
    };
    const form = new FormData();
    form.append("purpose", "user_data");
    form.append("file", file);
    request.send(form);
  });
}

async function* events(body, signal) {
  const response = await reach("v1/chat/completions", {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the server broke the answer off");
    });
    if (done) throw new Error("the server broke the answer off");
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const content = part.replace(/^data: /, "");
      if (content === "[DONE]") return;
      const event = JSON.parse(content);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- videos and images ---

// The file chosen last counts: one that is still on its way is given up.
async function show(name, load) {
  report(null);
  sending?.abort();
  const mine = sending = new AbortController();
  refreshButtons();
  let sent = null;
  const [facts, progress] = [element("facts"), element("progress")];
  progress.value = 0;
  progress.hidden = false;
  facts.textContent = `Sending ${name} …`;
  try {
    const file = await load(mine.signal);
    mine.signal.throwIfAborted();
    sent = await send(file, (share) => { progress.value = share; }, mine.signal);
    facts.textContent = "Sampling frames …";
    const seen = await get(`v1/files/${sent.id}/frames?frames=${frameCount()}`, mine.signal);
    const source = file.type.startsWith("video/") ? URL.createObjectURL(file) : null;
    add({ name, upload: sent, seen, source, image: file.type.startsWith("image/") });
    announce(`${name} is shown to the model`);
  } catch (error) {
    forget(sent);
    if (!mine.signal.aborted) report(error);
  } finally {
    if (sending === mine) {
      sending = null;
      facts.textContent = "";
      progress.hidden = true;
      element("file").value = "";
      refreshButtons();
    }
  }
}

function frameCount() {
  return element("panels").querySelector("[name=frames]")?.value || 64;
}

function add(medium) {
  media.push(medium);
  medium.item = card(medium);
  element("media").append(medium.item);
}

function remove(medium) {
  media = media.filter((each) => each !== medium);
  medium.item.remove();
  if (medium.source) URL.revokeObjectURL(medium.source);
  forget(medium.upload);
}

function card(medium) {
  const item = element("medium-template").content.firstElementChild.cloneNode(true);
  const [video, strip, facts] = ["video", ".strip", ".about"].map((part) => item.querySelector(part));
  item.querySelector("h3").textContent = medium.name;
  const button = item.querySelector(".remove");
  button.ariaLabel = `Remove ${medium.name}`;
  button.onclick = () => { remove(medium); element("choose").focus(); };
  if (!medium.seen) {
    facts.textContent = "The server fetches it when it is asked about.";
    strip.hidden = video.hidden = true;
    return item;
  }
  const { width, height, duration, frames } = medium.seen;
  facts.textContent = medium.image ? `${width} × ${height}`
    : `${width} × ${height}, ${duration.toFixed(1)} s; the model sees these ${frames.length} frames:`;
  if (medium.source) video.src = medium.source;
  video.hidden = !medium.source;
  video.ariaLabel = medium.name;
  strip.ariaLabel = `Frames of ${medium.name} that the model sees`;
  strip.replaceChildren(...frames.map(({ time, image }) => {
    const label = `${time.toFixed(1)} s`;
    const picture = make("img", { src: image, alt: `Frame at ${time.toFixed(1)} seconds` });
    const inside = medium.source
      ? make("button", { type: "button", onclick: () => seek(time, medium) }, picture, label)
      : make("span", {}, picture);
    return make("li", { dataset: { time } }, inside);
  }));
  video.ontimeupdate = () => {
    const past = [...strip.children].filter((frame) => Number(frame.dataset.time) <= video.currentTime + 0.01);
    for (const frame of strip.children) frame.classList.toggle("now", frame === past.at(-1));
  };
  return item;
}

// Seek a video; by default the first of what is shown.
function seek(time, medium = media.find((each) => each.source)) {
  if (!medium) return;
  const video = medium.item.querySelector("video");
  video.pause();
  video.currentTime = time;
  video.scrollIntoView({ block: "nearest" });
}

function partOf(medium) {
  if (medium.upload) return { type: "file", file: { file_id: medium.upload.id } };
  return { type: medium.image ? "image_url" : "video_url", [medium.image ? "image_url" : "video_url"]: { url: medium.url } };
}

function addUrl(event) {
  event.preventDefault();
  const url = element("url").value.trim();
  if (!url) return;
  add({ name: url.split("/").at(-1) || url, url, image: /\.(png|jpe?g|webp|bmp|gif)$/i.test(url) });
  element("url").value = "";
}

async function offerSamples() {
  const samples = await get("samples/index.json").catch(() => []);
  element("samples").hidden = samples.length === 0;
  for (const { file, name, questions } of samples) {
    element("samples").append(" ", make("button", { type: "button", textContent: name, onclick: () => {
      show(file, async (signal) => {
        const response = await reach(`samples/${file}`, { signal });
        if (!response.ok) throw await failure(response);
        return new File([await response.blob()], file, { type: "video/mp4" });
      });
    } }));
    for (const question of questions) {
      element("examples").append(make("button", { type: "button", textContent: question, onclick: () => {
        element("question").value = question;
        element("question").focus();
      } }));
    }
  }
}

// --- the answer ---

const number = (fields, name) => (fields[name].value === "" ? undefined : Number(fields[name].value));

function settingsOf(fieldset) {
  const fields = Object.fromEntries([...fieldset.querySelectorAll("[name]")].map((field) => [field.name, field]));
  const settings = { cache: fields.cache.value.trim() || undefined, remasking: fields.remasking.value };
  for (const name of ["gen_length", "block_length", "temperature", "seed", "frames"]) settings[name] = number(fields, name);
  if (fields.think.value) settings.think = fields.think.value === "yes";
  if (fields.pace.value) settings[fields.pace.value] = number(fields, "pace_value");
  return settings;
}

// Earlier turns, as far as what they were about is still shown, and the question.
function messagesFor(question, fresh) {
  const messages = [];
  for (const turn of turns) {
    const parts = turn.media.filter((medium) => media.includes(medium)).map(partOf);
    messages.push({ role: "user", content: [...parts, { type: "text", text: turn.question }] });
    if (turn.answer) messages.push({ role: "assistant", content: turn.answer });
  }
  return [...messages, { role: "user", content: [...fresh.map(partOf), { type: "text", text: question }] }];
}

// The draft, in the place where the answer or its thought will stand.
function draw(article, draft) {
  const thought = article.querySelector(".thought");
  if (draft.thinking) {
    thought.hidden = false;
    thought.querySelector("summary").textContent = "Thinking …";
  }
  article.querySelector(draft.thinking ? ".thought p" : ".text").replaceChildren(...draft.tokens.map(({ text, final, confidence }) => {
    const sure = Math.min(SURE - 1, Math.floor(confidence * SURE));
    const kind = text === null ? "open" : final ? "final" : `sure-${sure}`;
    return make("span", { className: `token ${kind}`, textContent: text ?? " ·" });
  }));
}

// The thought, once it is complete: folded.
function settleThought(article, text) {
  const box = article.querySelector(".thought");
  box.hidden = !text;
  box.querySelector("summary").textContent = "Thought";
  box.querySelector("p").textContent = text;
}

// The finished answer: times seek the video.
function settle(article, text, differs) {
  const box = article.querySelector(".text");
  box.classList.add("settled");
  box.replaceChildren(...(differs ? marked(text, differs) : withTimes(text || "(the model said nothing)")));
}

function withTimes(text) {
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(TIME)) {
    const [all, minutes, rest, seconds] = found;
    const time = seconds === undefined ? 60 * minutes + Number(rest) : Number(seconds);
    if (!media.some((medium) => medium.source && time <= medium.seen.duration)) continue;
    parts.push(text.slice(end, found.index));
    parts.push(make("button", { type: "button", className: "time", textContent: all, title: "Show this moment", onclick: () => seek(time) }));
    end = found.index + all.length;
  }
  return [...parts, text.slice(end)];
}

// The words of a text that are not in the longest common sequence with another's, marked.
function marked(text, other) {
  const [a, b] = [text.split(/(?<=\s)/), other.split(/(?<=\s)/)];
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i][j] = a[i].trim() === b[j].trim() ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const parts = [];
  for (let i = 0, j = 0; i < a.length;) {
    if (j < b.length && a[i].trim() === b[j].trim()) { parts.push(a[i]); i++; j++; }
    else if (j < b.length && length[i][j + 1] >= length[i + 1][j]) j++;
    else parts.push(make("mark", { textContent: a[i++] }));
  }
  return parts;
}

function statistics(article, draft, usage, confidence, seconds) {
  const { steps, tokens, forward_passes: passes, layer_tokens: computed, seconds: phases } = draft.statistics;
  const whole = passes * (usage.prompt_tokens + draft.slots) * computed.length;
  const saved = whole ? Math.max(0, 1 - computed.reduce((sum, each) => sum + each, 0) / whole) : 0;
  const box = article.querySelector(".cost");
  box.querySelector("summary").textContent =
    `${seconds.toFixed(1)} s · ${(tokens / phases.denoising).toFixed(0)} tokens a second${saved >= 0.005 ? ` · ${Math.round(100 * saved)} % of the work saved` : ""}`;
  const unsure = confidence.filter(({ share }) => share < 0.9).sort((one, other) => one.share - other.share).slice(0, 8)
    .map(({ text, share }) => `${text.trim() || "space"} ${Math.round(100 * share)} %`).join(", ");
  const rows = [["Steps", steps], ["Tokens decided", tokens], ["Tokens a forward pass", (tokens / passes).toFixed(2)],
    ["Prompt tokens", usage.prompt_tokens], ["Least certain", unsure || "all above 90 %"],
    ...Object.entries(phases).map(([phase, value]) => [`Seconds: ${phase}`, value.toFixed(3)])];
  box.querySelector("tbody").replaceChildren(...rows.map(([name, value]) =>
    make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value }))));
  box.hidden = false;
}

async function answer(article, messages, settings, signal) {
  const body = { model: model.id, stream: true, diffusing: true, logprobs: true, stream_options: { include_usage: true },
                 ...settings, messages };
  const started = performance.now();
  let text = "", reasoning = "", latest = null, usage = null, drawn = true;
  const confidence = [];
  for await (const event of events(body, signal)) {
    signal.throwIfAborted(); // of several events that came together, too
    const [choice] = event.choices;
    text += choice?.delta.content ?? "";
    reasoning += choice?.delta.reasoning_content ?? "";
    if (choice?.delta.content) settleThought(article, reasoning);
    for (const { token, logprob } of choice?.logprobs?.content ?? []) confidence.push({ text: token, share: Math.exp(logprob) });
    usage = event.usage ?? usage;
    if (event.diffusion) {
      latest = event.diffusion;
      if (drawn) {
        drawn = false;
        requestAnimationFrame(() => {
          drawn = true;
          if (!article.dataset.done) draw(article, latest);
        });
      }
    }
  }
  article.dataset.done = "yes";
  settleThought(article, reasoning);
  settle(article, text);
  statistics(article, latest, usage, confidence, (performance.now() - started) / 1000);
  return text;
}

async function ask(event) {
  event.preventDefault();
  const question = element("question").value.trim();
  if (sending || running || !question) return;
  report(null);
  // what is asked is what stands there now, whatever is chosen or typed before the second answer
  const chosen = [...element("panels").children].map(settingsOf);
  const asked = new Set(turns.flatMap((turn) => turn.media));
  const fresh = media.filter((medium) => !asked.has(medium));
  const messages = messagesFor(question, fresh);
  running = new AbortController();
  refreshButtons();
  const turn = { question, media: fresh, answer: "" };
  const item = prepareTurn(turn, chosen.length);
  const articles = [...item.querySelectorAll("article")];
  announce("Answering …");
  try {
    const texts = [];
    // one after the other: answers made together share their steps, and their times would say nothing
    for (const [place, settings] of chosen.entries()) {
      texts.push(await answer(articles[place], messages, settings, running.signal));
    }
    turn.answer = texts[0];
    if (texts.length === 2 && texts[0] !== texts[1]) articles.forEach((each, place) => settle(each, texts[place], texts[1 - place]));
    announce(`Answer: ${texts.join(" — ")}`);
    element("question").value = "";
    turns.push(turn);
  } catch (error) {
    const stopped = error.name === "AbortError";
    for (const article of articles.filter((each) => !each.dataset.done)) {
      article.dataset.done = "yes";
      article.querySelector(".text").replaceChildren(stopped ? "Stopped." : "No answer.");
    }
    announce(stopped ? "Stopped" : "");
    if (!stopped) report(error);
  } finally {
    running = null;
    refreshButtons();
    item.scrollIntoView({ block: "nearest" });
  }
}

function prepareTurn(turn, total) {
  const item = element("turn-template").content.firstElementChild.cloneNode(true);
  item.querySelector(".asked").textContent = turn.question;
  item.querySelector(".shown").textContent = media.length ? `about ${media.map((each) => each.name).join(", ")}` : "without a video";
  const answers = item.querySelector(".pair");
  answers.replaceChildren(...Array.from({ length: total }, (_, place) => stamp("answer-template", place, total)));
  element("talk").append(item);
  element("hint").hidden = true;
  item.scrollIntoView({ block: "nearest" });
  return item;
}

function startAnew() {
  turns = [];
  element("talk").replaceChildren();
  element("hint").hidden = false;
  refreshButtons();
  element("question").focus();
}

// --- panels ---

function stamp(templateId, place, total) {
  const copy = element(templateId).content.firstElementChild.cloneNode(true);
  const title = copy.querySelector("legend, h3");
  title.textContent = total > 1 ? `Setting ${NAMES[place]}` : templateId === "answer-template" ? "Answer" : "Decoding";
  title.classList.toggle("visually-hidden", total === 1);
  return copy;
}

function preparePanels() {
  const total = element("compare").checked ? 2 : 1;
  const panels = element("panels");
  while (panels.children.length > total) panels.lastElementChild.remove();
  while (panels.children.length < total) {
    const panel = stamp("settings-template", panels.children.length, 2);
    const [pace, value] = [panel.querySelector("[name=pace]"), panel.querySelector("[name=pace_value]")];
    pace.onchange = () => {
      value.disabled = !pace.value;
      value.required = Boolean(pace.value);
      value.value = { threshold: 0.9, factor: 1, steps: 32 }[pace.value] ?? "";
    };
    const facts = model.vidlada ?? {};
    if (facts.max_frames < 64) panel.querySelector("[name=frames]").value = facts.max_frames;
    panel.querySelector("[name=gen_length]").value = facts.gen_length ?? "";
    panel.querySelector("[name=block_length]").placeholder = facts.block_length ?? "";  // empty, it fits gen_length
    if (panels.children.length === 1) panel.querySelector("[name=cache]").value = "mars";
    panels.append(panel);
  }
  for (const panel of panels.children) panel.querySelector("legend").classList.toggle("visually-hidden", total === 1);
}

async function start() {
  try {
    [model] = (await get("v1/models")).data;
    element("model").textContent = model.id;
    document.body.classList.toggle("text-only", model.vidlada.text_only);
    element("alone").hidden = model.vidlada.multi_turn;
    element("key-box").open = false;
    report(null);
  } catch (error) {
    report(error);
  }
  element("panels").replaceChildren();
  preparePanels();
}

start();
offerSamples();
refreshButtons();
element("key").onchange = start;
element("compare").onchange = () => {
  preparePanels();
  element("settings").open ||= element("compare").checked;
};
element("form").onsubmit = ask;
element("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("form").requestSubmit();
};
element("stop").onclick = () => running?.abort();
element("fresh").onclick = startAnew;
element("url-form").onsubmit = addUrl;
element("choose").onclick = () => element("file").click();
const showFiles = async (files) => {
  for (const file of files) await show(file.name, async () => file);
};
element("file").onchange = () => showFiles([...element("file").files]);
// anywhere on the page: a drop beside the box must not leave it
let over = 0;
window.ondragenter = () => { over += 1; document.body.classList.add("over"); };
window.ondragleave = () => { over -= 1; if (!over) document.body.classList.remove("over"); };
window.ondragover = (event) => event.preventDefault();
window.ondrop = (event) => {
  event.preventDefault();
  over = 0;
  document.body.classList.remove("over");
  showFiles([...event.dataTransfer.files]);
};
