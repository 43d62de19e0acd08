/** Lists the runs that have data. */
export async function render() {
  const list = document.createElement("ul");
  document.body.append(list);
  const answer = await fetch("runs");
  for (const { run, steps, incidents } of await answer.json()) {
    const item = document.createElement("li");
    item.textContent = `${run}: ${steps} samples, ${incidents} incidents`;
    list.append(item);
  }
}
