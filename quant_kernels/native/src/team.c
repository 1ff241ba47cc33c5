/* See team.h. */
#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX()
#endif

/* Looks at the barrier before the core is offered to others: some 20 us. */
#define PATIENCE 1000
#define MOST_THREADS 256

typedef struct {
    qk_work work;
    void *argument;
    qk_team team;
    int joined;  /* members that asked for a number */
    int is_open; /* the number of threads that were made is known */
} job;

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*count_function)(void);

static parallel_function openmp_parallel;
static count_function openmp_size;

/* GOMP_parallel and omp_get_num_threads of the OpenMP library that torch uses; NULL to go without. */
void qk_set_openmp(void *parallel, void *num_threads) {
    openmp_parallel = (parallel_function)parallel;
    openmp_size = (count_function)num_threads;
}

static void join_job(job *j, int size) {
    /* All members write the same number. */
    __atomic_store_n(&j->team.size, size, __ATOMIC_RELAXED);
    j->work(&j->team, __atomic_fetch_add(&j->joined, 1, __ATOMIC_RELAXED), j->argument);
}

static void openmp_member(void *argument) { join_job(argument, openmp_size()); }

static void *thread_member(void *argument) {
    job *j = argument;
    while (!__atomic_load_n(&j->is_open, __ATOMIC_ACQUIRE)) sched_yield();
    join_job(j, __atomic_load_n(&j->team.size, __ATOMIC_RELAXED));
    return NULL;
}

void qk_run(qk_work work, void *argument, int size) {
    job j = {work, argument, {1, 0, 0, 0}, 0, 0};
    pthread_t threads[MOST_THREADS];
    if (size > MOST_THREADS) size = MOST_THREADS;
    if (size <= 1) {
        join_job(&j, 1);
        return;
    }
    if (openmp_parallel != NULL && openmp_size != NULL) {
        openmp_parallel(openmp_member, &j, (unsigned)size, 0);
        return;
    }
    /* Members wait for each other, so their number must be known before one of them starts. */
    int made = 0;
    while (made < size - 1 && pthread_create(&threads[made], NULL, thread_member, &j) == 0) made++;
    j.team.size = made + 1;
    __atomic_store_n(&j.is_open, 1, __ATOMIC_RELEASE);
    join_job(&j, made + 1);
    for (int i = 0; i < made; i++) pthread_join(threads[i], NULL);
}

void qk_wait(qk_team *team) {
    if (team->size == 1) {
        team->next = 0;
        return;
    }
    const int round = __atomic_load_n(&team->round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
        team->arrived = 0;
        team->next = 0;
        __atomic_store_n(&team->round, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int looks = 0; __atomic_load_n(&team->round, __ATOMIC_ACQUIRE) == round; looks++) {
        if (looks < PATIENCE)
            RELAX();
        else
            sched_yield();
    }
}
