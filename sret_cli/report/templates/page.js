"use strict";
{
  const root = document.documentElement;
  const stored = (value) => {
    try { // a browser may refuse storage to files
      if (value !== undefined) localStorage.setItem("sret-theme", value);
      return localStorage.getItem("sret-theme");
    } catch {
      return null;
    }
  };
  const chosen = stored();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

  function setUpTheme(button) {
    const system = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const name = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      stored(root.dataset.theme);
      name();
    });
    system.addEventListener("change", name);
    name();
    button.hidden = false;
  }

  function openTarget(hash) {
    let id = hash.slice(1);
    try { id = decodeURIComponent(id); } catch { /* not encoded */ }
    const target = document.getElementById(id);
    if (!(target instanceof HTMLDetailsElement)) return;
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
    target.querySelector("summary").focus({ preventScroll: true });
  }

  function setUpLinks() {
    document.addEventListener("click", (event) => {
      const link = event.target.closest('a[href^="#"]');
      if (link && !event.defaultPrevented) setTimeout(openTarget, 0, link.getAttribute("href"));
    });
    addEventListener("hashchange", () => openTarget(location.hash));
    openTarget(location.hash);
  }

  function setUpPoints(tooltip) {
    let shown = null;
    const place = () => {
      if (!shown) return;
      const at = shown.getBoundingClientRect(), size = tooltip.getBoundingClientRect();
      const left = Math.min(at.right + 8, innerWidth - size.width - 8);
      const top = at.top - size.height - 6;
      tooltip.style.left = `${Math.max(8, left)}px`;
      tooltip.style.top = `${top < 8 ? at.bottom + 6 : top}px`;
    };
    const hide = () => {
      shown?.classList.remove("shown");
      shown = null;
      tooltip.hidden = true;
    };
    const show = (point) => {
      if (shown !== point) hide();
      if (!point) return;
      shown = point;
      point.classList.add("shown");
      tooltip.textContent = point.getAttribute("aria-label");
      tooltip.hidden = false;
      place();
    };
    for (const box of document.querySelectorAll("figure .scroll")) {
      const points = [...box.querySelectorAll("a.point")];
      const nearest = (event) => {
        let found = null, least = 14; // pixels: markers are small for fingers, and may overlap
        for (const point of points) {
          const at = point.getBoundingClientRect();
          const x = at.left + at.width / 2 - event.clientX, y = at.top + at.height / 2 - event.clientY;
          if (Math.hypot(x, y) < least) [found, least] = [point, Math.hypot(x, y)];
        }
        return found;
      };
      points.forEach((point, index) => {
        point.querySelector("title").remove(); // the tooltip says the same
        point.tabIndex = index ? -1 : 0;
      });
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
      box.addEventListener("keydown", (event) => {
        const now = points.indexOf(document.activeElement);
        const to = { Home: 0, End: points.length - 1 }[event.key] ?? now + step[event.key];
        if (now < 0 || !points[to]) return;
        event.preventDefault();
        points[now].tabIndex = -1;
        points[to].tabIndex = 0;
        points[to].focus();
      });
      box.addEventListener("pointermove", (event) => {
        show(nearest(event));
        box.style.cursor = shown ? "pointer" : "";
      });
      box.addEventListener("pointerleave", hide);
      box.addEventListener("click", (event) => {
        const point = event.detail && nearest(event); // detail is 0 for the keyboard
        if (!point || event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        location.hash = point.getAttribute("href");
        openTarget(location.hash);
      });
      box.addEventListener("focusin", (event) => show(event.target.closest("a.point")));
      box.addEventListener("focusout", hide);
    }
    addEventListener("scroll", place, { passive: true, capture: true });
    addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }

  function setUpSettings() {
    for (const rest of document.querySelectorAll("details.rest")) {
      rest.addEventListener("toggle", () => {
        const table = document.getElementById(rest.dataset.common).querySelector("table");
        rest.lastElementChild.replaceWith(table.cloneNode(true));
      }, { once: true });
    }
  }

  async function loadDataTables() {
    const packed = atob(document.getElementById("datatables").textContent);
    const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const source = await new Response(stream).arrayBuffer();
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { default: DataTable } = await import(url);
    URL.revokeObjectURL(url);
    DataTable.ext.errMode = "throw";
    return DataTable;
  }

  function setUpTable(table, DataTable) {
    const box = table.closest(".scroll");
    const data = new DataTable(table, {
      paging: false,
      autoWidth: false,
      order: [],
      layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    });
    if (table.classList.contains("filtered")) {
      const tools = document.createElement("div");
      tools.className = "tools";
      const label = document.createElement("label");
      const input = document.createElement("input");
      const count = document.createElement("output");
      input.type = "search";
      input.setAttribute("aria-controls", table.id);
      input.setAttribute("aria-label", `Filter: ${table.caption.textContent}`);
      label.append("Filter: ", input);
      tools.append(label, count);
      box.before(tools);
      const total = data.rows().count();
      input.addEventListener("input", () => {
        data.search(input.value).draw();
        const shown = data.rows({ search: "applied" }).count();
        count.textContent = shown < total ? `${shown} of ${total}` : "";
      });
    }
    if (table.id === "all-runs") {
      data.on("draw", () => {
        const hashes = data.rows({ search: "applied" }).nodes().toArray()
          .map((line) => line.querySelector("a").getAttribute("href"));
        const shown = new Set(hashes);
        for (const run of document.querySelectorAll("details.run")) {
          run.hidden = !shown.has(`#${run.id}`);
        }
      });
    }
  }

  addEventListener("DOMContentLoaded", async () => {
    setUpTheme(document.getElementById("theme"));
    setUpPoints(document.getElementById("tooltip"));
    setUpSettings();
    setUpLinks();
    const DataTable = await loadDataTables();
    for (const table of document.querySelectorAll("table.sortable")) setUpTable(table, DataTable);
    root.dataset.ready = "true";
    openTarget(location.hash); // tables above have other heights now
  });
}
