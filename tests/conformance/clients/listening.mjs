// What every EventSource does: listens to a stream until the server has it stay away, and says what it was given.

export function listen(make, url, names) {
  return new Promise((resolve) => {
    const source = make(url);
    const events = [];
    for (const name of names) {
      source.addEventListener(name, ({ type, data, lastEventId }) => events.push([type, data, lastEventId]));
    }
    source.onerror = () => {
      if (source.readyState === 2) resolve(events);
    };
  });
}
