/* A team of threads that runs one function together, and what its members need to take turns.
 *
 * torch's own OpenMP threads are borrowed where they are known (qk_set_openmp), so that no second pool waits, spinning,
 * for work on the same cores. Otherwise threads are made for the call. */
#ifndef QK_TEAM_H
#define QK_TEAM_H

#include <stdint.h>

typedef struct {
    int size;
    int arrived;     /* at the barrier */
    int round;       /* of the barrier */
    int64_t next;    /* the first piece of work that nobody has taken since the last barrier */
} qk_team;

typedef void (*qk_work)(qk_team *team, int member, void *argument);

/* Run `work` on up to `size` threads, of which the caller's is one; `team->size` is how many there are. */
void qk_run(qk_work work, void *argument, int size);

/* Pieces of work per thread and phase: threads that are slower, or interrupted, take fewer. */
#define QK_PIECES 6

/* Wait for all members; then all work of the next phase is free to be taken. */
void qk_wait(qk_team *team);

/* Take `count` neighbouring pieces of work: the index of the first. */
static inline int64_t qk_take(qk_team *team, int64_t count) {
    return team->size == 1 ? (team->next += count) - count : __atomic_fetch_add(&team->next, count, __ATOMIC_RELAXED);
}

#endif
