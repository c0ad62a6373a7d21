/* LD_PRELOAD: every fsync takes as many seconds more as the file named by STRESS_FSYNC holds, while there is one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void wait_first(void) {
    const char *path = getenv("STRESS_FSYNC");
    FILE *file = path ? fopen(path, "r") : NULL;
    double seconds = 0;
    if (!file) return;
    if (fscanf(file, "%lf", &seconds) == 1 && seconds > 0) usleep((useconds_t)(seconds * 1e6));
    fclose(file);
}

int fsync(int fd) {
    int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_first();
    return next(fd);
}

int fdatasync(int fd) {
    int (*next)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_first();
    return next(fd);
}
