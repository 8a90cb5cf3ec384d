/* The only process of the emulated machine: runs the program with its own arguments (the kernel hands over what follows
 * "--" on its command line), says how it ended, and switches the machine off. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(int count, char **arguments)
{
    int status = 0;
    (void)count;
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    setenv("LD_BIND_NOW", "1", 1); /* binding at the first call saves registers by XSAVEC, which Bochs 2.7 gets wrong */
    printf("avx512 %s\n", __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") ? "yes" : "no");
    fflush(stdout);
    if (fork() == 0) {
        execv("/program", arguments);
        perror("/program");
        _exit(127);
    }
    wait(&status);
    printf("exit status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    fflush(stdout);
    tcdrain(1);
    reboot(RB_POWER_OFF);
    return 1;
}
