import { fileURLToPath } from "node:url";
import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

// client.js, share.js, react.js and their types. In a project of your own, copy them from your server
// (curl -O https://status.example.com/react.js) to src/statuswire/, and leave out `resolve` and `fs` below: they are
// for files that lie outside of the project, and still have to find its React.
const files = fileURLToPath(new URL("../../../server/web", import.meta.url));

// One origin, as behind nginx: the page, the application that starts work, and statuswire. No CORS, and cookies come along.
const proxy = {
  "/exports": process.env.APPLICATION_URL ?? "http://127.0.0.1:8001",
  "/status/": { target: process.env.STATUSWIRE_ORIGIN ?? "http://127.0.0.1:3000", ws: true },
};

export default defineConfig({
  plugins: [react()],
  resolve: { alias: { statuswire: files }, dedupe: ["react"] },
  server: { proxy, fs: { allow: [".", files] } },
  preview: { proxy },
});
