/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Kicks and calls: descriptors that somebody shares with us, who may make a read or write of them wait at any time.
 * O_NONBLOCK is his as well as ours, and an eventfd's write knows no RWF_NOWAIT. So between our setting the flag and our
 * writing he can clear it and fill the counter, and the write waits until somebody reads, which may be never.
 *
 * Such a wait ends by a signal (EINTR). A worker gets one from the main thread, which waits for it at the gate
 * (vv_interrupt), if that takes long. The main thread gives itself one, by a timer that is set while it could be held up
 * (vv_watch_begin). The handler does nothing, and is there without SA_RESTART. A tick that comes before the wait begins
 * is followed by another. It costs a worker nothing, and the main thread two system calls for each call of its own.
 */
#ifndef VIRTIOVA_NOTIFY_H
#define VIRTIOVA_NOTIFY_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* Between two ticks: much longer than whoever is watched takes, if nothing is wrong. */
#define VV_TICK_NS 100000000
/* How often somebody may win the race before a driver that does not read its counter is taken for one that is told. */
#define VV_TELL_TRIES 16

/* -- the signal */

static int vv_interrupt_number;

static void vv_interrupted(int number)
{
    (void)number;
}

/* Take a signal that nobody uses. 0, or -1: there is none left, and nothing is interrupted. */
static int vv_interrupt_install(void)
{
    struct sigaction now, action;
    int number;

    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = vv_interrupted;
    for (number = SIGRTMAX; !vv_interrupt_number && number >= SIGRTMIN; number--)
        if (!sigaction(number, NULL, &now) && !(now.sa_flags & SA_SIGINFO) && now.sa_handler == SIG_DFL &&
            !sigaction(number, &action, NULL))
            vv_interrupt_number = number;
    return vv_interrupt_number ? 0 : -1;
}

static inline void vv_interrupt(pthread_t thread)
{
    if (vv_interrupt_number)
        pthread_kill(thread, vv_interrupt_number);
}

/* A timer of this thread's: made once. */
static __thread struct {
    timer_t timer;
    int made; /* -1: cannot be */
} vv_watch;

static void vv_watch_make(void)
{
    struct sigevent event;

    vv_watch.made = -1;
    if (vv_interrupt_install())
        return;
    memset(&event, 0, sizeof event);
    event.sigev_notify = SIGEV_THREAD_ID;
    event.sigev_signo = vv_interrupt_number;
    event.sigev_notify_thread_id = (int)syscall(SYS_gettid);
    if (!timer_create(CLOCK_MONOTONIC, &event, &vv_watch.timer))
        vv_watch.made = 1;
}

static inline void vv_watch_set(long nanoseconds)
{
    const struct itimerspec when = {{0, nanoseconds}, {0, nanoseconds}};

    if (vv_watch.made > 0)
        timer_settime(vv_watch.timer, 0, &when, NULL);
}

/* From here to the end no system call of this thread waits for long, but with EINTR. */
static inline void vv_watch_begin(void)
{
    if (!vv_watch.made)
        vv_watch_make();
    vv_watch_set(VV_TICK_NS);
}

static inline void vv_watch_end(void)
{
    const int kept = errno;

    vv_watch_set(0);
    errno = kept;
}

/* -- notifications */

static inline int vv_never_wait(int fd)
{
    int yes = 1;

    return ioctl(fd, FIONBIO, &yes);
}

/* Whether the driver could be told; a counter that is full tells it already. */
static inline int vv_signal(int fd)
{
    const uint64_t one = 1;
    struct pollfd room = {fd, POLLOUT, 0};
    unsigned tries;

    if (fd < 0)
        return 1;
    for (tries = 0; tries < VV_TELL_TRIES; tries++) {
        if (vv_never_wait(fd))
            return 0;
        if (write(fd, &one, sizeof one) >= 0 || errno == EAGAIN)
            return 1;
        if (errno != EINTR)
            return 0;
        if (!poll(&room, 1, 0))
            return 1;
    }
    return 1;
}

/* Take the kicks that are there: 1 if there were any, 0 if none, -1 at the end of the file or with errno. */
static inline int vv_take_kicks(int fd)
{
    char some[512];
    struct iovec into = {some, sizeof some};
    ssize_t count = preadv2(fd, &into, 1, -1, RWF_NOWAIT);

    if (count < 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) {
        if (vv_never_wait(fd))
            return -1;
        count = read(fd, some, sizeof some);
    }
    if (count > 0)
        return 1;
    if (count < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    errno = 0;
    return -1;
}

static inline void vv_drain_wake(int fd)
{
    uint64_t count;

    if (read(fd, &count, sizeof count) < 0)
        errno = 0; /* nobody has woken us: as good */
}

#endif
