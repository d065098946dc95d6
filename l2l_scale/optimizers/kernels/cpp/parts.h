// Sums over coordinates that do not depend on the number of threads: coordinates are dealt to a number of parts
// that follows from the problem alone, and the parts are added in order. Float sums are short; long ones are kept
// in double.
#pragma once

#include <algorithm>
#include <new>
#include <optional>
#include <vector>

#include "window.h"

namespace l2l {

// How work is divided.
struct Parts {
  int count;
  int64_t flush_every;  // units of work after which float sums go into double
};

inline Parts divide(int64_t coordinates, int64_t steps, size_t size) {
  const int64_t most = std::clamp<int64_t>((32 << 20) / int64_t(size * sizeof(double)), 1, 256);
  return {int(std::clamp<int64_t>(coordinates * steps / 4096, 1, most)), std::max<int64_t>(1, 20 / steps)};
}

// Run `units` pieces of work on threads and add up the `size` numbers that each adds to its sums.
//
// `make(arena)` gives a thread its worker, a function of (unit, sums), in `bytes` of working memory.
template <class T, class Make>
std::vector<double> sum_parts(const Parts& parts, int64_t units, size_t size, size_t bytes, int threads,
                              const Make& make) {
  using Worker = decltype(make(thread_arena<T>()));
  std::vector<double> totals(size * parts.count, 0.0);
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(|| : failed)
  {
    Arena& arena = thread_arena<T>();
    failed = !arena.reserve(bytes + Arena::bytes<T>(size));
    T* sums = arena.take<T>(size);
    std::optional<Worker> worker;
    if (!failed) {
      try {
        worker.emplace(make(arena));
      } catch (const std::bad_alloc&) {  // must not leave the thread
        failed = true;
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int part = 0; part < parts.count; ++part) {
      const int64_t begin = units * part / parts.count, end = units * (part + 1) / parts.count;
      double* total = totals.data() + size * part;
      for (int64_t unit = begin; unit < end && !failed;) {
        std::fill_n(sums, size, T(0));
        for (const int64_t stop = std::min(unit + parts.flush_every, end); unit < stop; ++unit) (*worker)(unit, sums);
        for (size_t i = 0; i < size; ++i) total[i] += sums[i];
      }
    }
  }
  if (failed) throw std::bad_alloc();
  for (int part = 1; part < parts.count; ++part) {
    for (size_t i = 0; i < size; ++i) totals[i] += totals[size * part + i];
  }
  totals.resize(size);
  return totals;
}

}  // namespace l2l
