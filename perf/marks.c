/* Callgrind's client requests as functions that Python can call; nothing outside of valgrind. */
#include <valgrind/callgrind.h>

void marks_begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void marks_rest(void) { CALLGRIND_STOP_INSTRUMENTATION; }
void marks_toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void marks_clear(void) { CALLGRIND_ZERO_STATS; }
void marks_dump(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
