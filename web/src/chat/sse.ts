// Server-sent events out of text that arrives in pieces of any size.

/** Returns the data of each event that has become whole; keep one for one stream. */
export function eventReader(): (piece: string) => string[] {
  let rest = "";
  let data: string[] = [];
  return (piece) => {
    const whole: string[] = [];
    rest += piece;
    // A carriage return at the end may be half of a line break.
    const usable = rest.endsWith("\r") ? rest.length - 1 : rest.length;
    const lines = rest.slice(0, usable).split(/\r\n|\n|\r/);
    rest = (lines.pop() ?? "") + rest.slice(usable);
    for (const line of lines) {
      if (line === "") {
        if (data.length > 0) whole.push(data.join("\n"));
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
      }
    }
    return whole;
  };
}
