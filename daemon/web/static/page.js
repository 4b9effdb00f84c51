"use strict";
// Keeps the parts marked data-live fresh. Without scripts the pages are whole, only older.
const PERIOD = 2000;

async function refresh() {
  if (document.hidden) return;
  const answer = await fetch(location.pathname + location.search, { credentials: "same-origin" });
  if (!answer.ok) throw new Error(String(answer.status));
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.getElementById(part.id);
    // never take the ground from under somebody who is reading with the keyboard or selects text
    const busy = part.contains(document.activeElement) || !getSelection().isCollapsed;
    if (other && !busy && other.innerHTML !== part.innerHTML) part.innerHTML = other.innerHTML;
  }
}

async function turn() {
  const mark = document.getElementById("fresh");
  try {
    await refresh();
    mark.textContent = "live";
    document.body.classList.remove("stale");
  } catch {
    mark.textContent = "the daemon does not answer";
    document.body.classList.add("stale");
  }
  setTimeout(turn, PERIOD);
}

if (document.querySelector("[data-live]")) setTimeout(turn, PERIOD);
if (new URLSearchParams(location.search).has("said")) history.replaceState(null, "", location.pathname);
