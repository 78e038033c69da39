// React as a module, for pages without a bundler: it is published as CommonJS only. Bundled by test_components.py.

import React from "react";
import client from "react-dom/client";

export const { StrictMode, createContext, createElement, useContext, useEffect, useMemo, useState, useSyncExternalStore } = React;
export const { createRoot } = client;
