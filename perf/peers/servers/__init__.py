"""One module for each peer, in the form its own documentation gives a broadcast.

All are started with `--port` and `--feed`, take readers at `/ws/<channel>` and `/sse/<channel>` (what they have of it),
greet each with one message, and pass on to a channel's readers what comes on the feed: `<channel> TAB <message> LF`.
"""
