// Which panel is shown: kept in the address behind #, so that back, reload and bookmarks work.

export const PANELS = ["mesh", "models", "chat", "join", "activity"] as const;
export type Panel = (typeof PANELS)[number];

function fromAddress(): Panel {
  const name = location.hash.replace(/^#\/?/, "").split(/[/?]/)[0] ?? "";
  return (PANELS as readonly string[]).includes(name) ? (name as Panel) : "mesh";
}

class Router {
  panel = $state<Panel>(fromAddress());

  start(): () => void {
    const follow = () => {
      this.panel = fromAddress();
    };
    addEventListener("hashchange", follow);
    return () => removeEventListener("hashchange", follow);
  }

  go(panel: Panel): void {
    location.hash = `/${panel}`;
  }
}

export const router = new Router();
