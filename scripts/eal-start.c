/* Times rte_eal_init(): the DPDK half of the comparison with eal/examples/vireo-eal-start.rs in `scripts/bench start`. */
#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#include <rte_eal.h>

static int64_t nanoseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int main(int argc, char **argv)
{
    int64_t since = nanoseconds();

    if (rte_eal_init(argc, argv) < 0)
        return 1;
    printf("init took %" PRId64 " ns\n", nanoseconds() - since);
    return rte_eal_cleanup() < 0;
}
