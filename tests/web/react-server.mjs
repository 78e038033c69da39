// The same page, rendered where there is no browser. Bundled and run by test_components.py.

import { createElement } from "react";
import { renderToString } from "react-dom/server";
import { App } from "./react-page.mjs";

process.stdout.write(renderToString(createElement(App)));
