// The installed engine from C++: that the header compiles and its functions link. Results are compared elsewhere.
#include <lineas.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

int main()
{
    if (std::strcmp(lns_version(), LNS_VERSION) != 0 || lns_cpu_init(nullptr) != 0) {
        std::puts("not the library of this header");
        return 1;
    }
    const std::vector<float> column = {3, -1, 2};
    std::vector<float> sorted(column.size());
    const lns_sample sample = {column.data(), LNS_F32, 3, 1, nullptr};
    struct alignas(64) line {
        unsigned char bytes[64];
    };
    const int64_t size = lns_sort_worksize(&sample, 1, 1);
    std::vector<line> work(static_cast<std::size_t>(size) / sizeof(line) + 1);
    void *const out[] = {sorted.data()};
    lns_place place = {};
    const lns_status status = lns_sort(&sample, 1, 1, work.data(), out, &place);
    if (status != LNS_OK || sorted != std::vector<float>{-1, 2, 3}) {
        std::puts(lns_status_text(status));
        return 1;
    }
    /* A covariance needs BLAS. */
    double mean = 0, variance = 0;
    std::vector<double> covariance_work(static_cast<std::size_t>(lns_covariance_worksize(3, 1)) / sizeof(double));
    if (lns_covariance(&sample, covariance_work.data(), &mean, &variance, nullptr) != LNS_OK ||
        std::fabs(variance - 13.0 / 3) > 1e-14) {
        std::puts("wrong variance");
        return 1;
    }
    return 0;
}
