// The form that asks for a name, or for an invitation link.

import { ask, takeName, takeToken } from "./api.js";

const $ = (id) => document.getElementById(id);

/** Prepares the form, with a line about the last attempt. `start()` is called when it is sent. */
export async function signIn(line, start, onLost) {
  const { open } = await ask("/api/mode", onLost);
  $("refusal").textContent = line;
  $("given-label").textContent = open ? "Your name" : "Your invitation link";
  $("given").maxLength = open ? 40 : 500;
  $("given").value = "";
  $("given-note").textContent = open
    ? "The name is written beside your scores. Use the same one each time."
    : "Open the link that you were sent, or paste it here.";
  $("enter").onsubmit = (event) => {
    event.preventDefault();
    const given = $("given").value.trim();
    if (open) takeName(given);
    else takeToken(given);
    start();
  };
}
