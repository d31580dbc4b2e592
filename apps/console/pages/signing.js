// Decisions of an operator, signed in the browser.
//
// The key is read from the file its holder chooses, into a CryptoKey that no script can read out,
// and is forgotten when the page is left.  What is signed are the canonical bytes of
// `apps/maintenance/sync/operators.py`: JSON with sorted keys, no spaces, ASCII.

const ALGORITHM = { name: "Ed25519" };
const PROOF = new TextEncoder().encode("trimoe console: whose key is this?");

export const canSign = () => Boolean(globalThis.crypto?.subtle);

// Return {operator, key}; throws an Error whose message is one clear line.
export async function importKey(text, operators) {
  let key;
  try {
    key = await crypto.subtle.importKey("pkcs8", bytesOf(text, "PRIVATE KEY"), ALGORITHM, false, ["sign"]);
  } catch {
    throw new Error("key: expected an Ed25519 private key in PEM, as trimoe sync rollout operator makes it");
  }
  const signature = await crypto.subtle.sign(ALGORITHM, key, PROOF);
  for (const [operator, pem] of Object.entries(operators)) {
    const known = await crypto.subtle
      .importKey("spki", bytesOf(pem, "PUBLIC KEY"), ALGORITHM, false, ["verify"])
      .catch(() => null);
    if (known && (await crypto.subtle.verify(ALGORITHM, known, signature, PROOF))) return { operator, key };
  }
  const names = Object.keys(operators).join(", ") || "nobody";
  throw new Error(`key: expected that of an operator (${names}), got another`);
}

export async function sign(key, text) {
  const signature = await crypto.subtle.sign(ALGORITHM, key, new TextEncoder().encode(text));
  return [...new Uint8Array(signature)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function canonical(decision) {
  const sorted = Object.fromEntries(Object.entries(decision).sort(([a], [b]) => (a < b ? -1 : 1)));
  const escape = (found) => `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(sorted).replace(/[\u007f-\uffff]/g, escape);
}

function bytesOf(pem, what) {
  const found = pem.match(new RegExp(`-----BEGIN ${what}-----([A-Za-z0-9+/=\\s]+)-----END ${what}-----`));
  if (!found) throw new Error(`expected -----BEGIN ${what}-----`);
  return Uint8Array.from(atob(found[1].replace(/\s/g, "")), (letter) => letter.charCodeAt(0));
}
