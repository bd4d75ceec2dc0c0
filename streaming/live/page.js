"use strict";
(() => {
  const words = JSON.parse(document.documentElement.dataset.words);
  const language = document.documentElement.lang;
  const KEPT = 150;
  let frames = [];
  let answered = 0;

  const say = (name) => words[name] ?? name;
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const number = (value) => {
    if (!known(value)) return "–";
    if (value === 0) return "0";
    const digits = Math.abs(value) >= 100 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 3 };
    return value.toLocaleString(language, digits);
  };
  const percent = (share) => (known(share) ? `${number(100 * share)} %` : "–");
  const made = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const place = (id, children) => document.getElementById(id).replaceChildren(...children);

  const tile = (value, text, kind) => {
    const card = made("div", undefined, "tile");
    card.append(made("b", value), made("span", text));
    if (kind) card.append(" ", made("span", say(kind), `kind ${kind}`));
    return card;
  };

  const table = (heads, rows) => {
    const head = made("tr");
    head.append(...heads.map((text) => made("th", text)));
    const body = rows.map((cells) => {
      const row = made("tr");
      row.append(...cells.map((cell) => (cell instanceof Node ? cell : made("td", cell))));
      return row;
    });
    const whole = made("table");
    whole.append(head, ...body);
    return whole;
  };

  const plot = (text, pick, show, limit) => {
    const figure = made("figure");
    const caption = made("figcaption");
    const points = frames.map((frame) => [frame.at_s, pick(frame)]).filter(([, value]) => known(value));
    const last = points.length ? points[points.length - 1][1] : NaN;
    caption.append(made("span", text), made("b", show(last)));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 300 60");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${text}: ${show(last)}`);
    if (points.length > 1) {
      const highest = Math.max(...points.map(([, value]) => value), known(limit) ? limit : 0) || 1;
      const end = points[points.length - 1][0];
      const x = (at) => 300 - (300 * (end - at)) / 300;
      const y = (value) => 58 - (54 * value) / highest;
      const path = document.createElementNS(svg.namespaceURI, "path");
      let drawn = "";
      points.forEach(([at, value], index) => {
        const apart = index === 0 || at - points[index - 1][0] > 8;
        drawn += `${apart ? "M" : "L"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      });
      path.setAttribute("d", drawn);
      svg.append(path);
      if (known(limit)) {
        const line = document.createElementNS(svg.namespaceURI, "line");
        for (const [name, value] of Object.entries({ x1: 0, x2: 300, y1: y(limit), y2: y(limit) })) {
          line.setAttribute(name, value);
        }
        svg.append(line);
      }
    }
    figure.append(caption, svg);
    return figure;
  };

  const pathOf = (frame, name) => frame.paths.find((one) => one.path === name);
  const limitOf = (frame, path) => frame.limits_ms[`p99 of ${path}`];
  const objectiveText = (name) => {
    const [quantile, path] = name.split(" of ");
    if (path === undefined) return say("degraded_share");
    return say("objective").replace("{quantile}", quantile).replace("{path}", say(path));
  };

  const draw = (answer) => {
    const frame = frames[frames.length - 1];
    place("parts", [list(answer.components)]);
    if (!frame) return;
    const kinds = Object.keys(frame.mj_per_decision).sort();
    const grams = Object.entries(frame.carbon_g_per_million).sort();
    place("tiles", [
      tile(`${number(frame.per_second)}/s`, say("decisions")),
      tile(percent(frame.escalated_share), say("escalated_share")),
      tile(percent(frame.degraded_share), say("degraded_share")),
      ...kinds.map((kind) => tile(`${number(frame.mj_per_decision[kind])} mJ`, say("per_decision"), kind)),
      ...kinds.map((kind) => tile(`${number(frame.watts[kind])} W`, say("power"), kind)),
      ...(grams.length
        ? grams.map(([kind, value]) => tile(`${number(value)} g`, say("carbon"), kind))
        : [tile("–", say("no_carbon"))]),
      tile(number(frame.lag), say("waiting")),
    ]);
    place("paths", [
      table(
        [say("path"), "/s", "p50 ms", "p99 ms", say("limit_ms")],
        frame.paths.map((one) => {
          const limit = limitOf(frame, one.path);
          const over = known(limit) && known(one.p99_ms) && one.p99_ms > limit;
          const p99 = made("td", `${number(one.p99_ms)}${over ? " ▲" : ""}`, over ? "bad" : undefined);
          return [say(one.path), number(one.per_second), number(one.p50_ms), p99, number(limit)];
        }),
      ),
    ]);
    place("objectives", [
      table(
        [say("name"), say("burn"), say("state")],
        Object.entries(frame.burn).map(([name, burn]) => {
          const state = !known(burn) ? "no_data" : burn <= 1 ? "within" : "over";
          const cell = made("td", say(state), { within: "good", over: "bad" }[state]);
          return [objectiveText(name), known(burn) ? `${number(burn)} ×` : "–", cell];
        }),
      ),
    ]);
    place("plots", [
      plot(`${say("decisions")}/s`, (one) => one.per_second, number),
      ...["screened", "escalated"].map((path) =>
        plot(`${say(path)} p99, ms`, (one) => pathOf(one, path)?.p99_ms, number, limitOf(frame, path)),
      ),
      plot(say("escalated_share"), (one) => one.escalated_share, percent),
      ...kinds.map((kind) =>
        plot(`mJ, ${say(kind)}`, (one) => one.mj_per_decision[kind], number),
      ),
    ]);
  };

  const list = (components) => {
    const whole = made("ul");
    whole.append(
      ...components.map((part) => {
        const item = made("li");
        const good = part.status === "ok";
        item.append(made("span", `${part.name}: ${say(`status_${part.status}`)}`, good ? "good" : "bad"));
        if (part.text) item.append(` ${part.text}`);
        return item;
      }),
    );
    return whole;
  };

  const tell = (text) => {
    document.getElementById("status").textContent = text;
  };

  const ask = async () => {
    try {
      const response = await fetch(`frames?after=${answered}`, { cache: "no-store" });
      if (!response.ok) throw new Error(String(response.status));
      const answer = await response.json();
      const newest = answer.frames.length ? answer.frames[answer.frames.length - 1].number : answered;
      if (newest < answered) frames = [];
      frames = frames.concat(answer.frames).slice(-KEPT);
      answered = newest;
      draw(answer);
      const at = new Date(1000 * answer.at_s).toLocaleTimeString(language);
      tell(`${say(answer.ready ? "ready" : "not_ready")} · ${at}${frames.length ? "" : ` · ${say("first")}`}`);
    } catch (error) {
      tell(say("silent"));
      answered = 0;
      frames = [];
    }
    setTimeout(ask, 2000);
  };
  ask();
})();
