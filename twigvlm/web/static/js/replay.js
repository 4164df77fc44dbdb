// All answers side by side, at the speed at which they were written.

/** Plays the columns' recorded times; `tell` hears the time, `done` that it ended. Gives back a function that ends it now. */
export function replay(columns, tell, done) {
  const shown = columns.filter((column) => column.steps.length);
  for (const column of shown) {
    column.rewind();
    column.mark("running");
  }
  const start = performance.now();
  let frame = 0, over = false;

  function show(now) {
    let all = true;
    for (const column of shown) {
      const ended = column.reveal(now);
      if (ended) column.mark("done");
      all &&= ended;
    }
    return all;
  }

  function finish() {
    if (over) return;
    over = true;
    cancelAnimationFrame(frame);
    show(Infinity);
    done();
  }

  function tick() {
    const now = (performance.now() - start) / 1000;
    tell(now);
    if (show(now)) finish();
    else frame = requestAnimationFrame(tick);
  }

  frame = requestAnimationFrame(tick);
  return finish;
}
