// Checks for tests that are plain programs: each is counted, one that fails is printed with its place and its words.
#pragma once

#include <cmath>
#include <cstdint>
#include <iomanip>
#include <iostream>

namespace fusegrad::test {

inline int64_t checks = 0, failures = 0;
constexpr int64_t kPrinted = 20;  // the first failures tell enough

template <class... Words>
void check(bool holds, const char* file, int line, const Words&... words) {
  ++checks;
  if (holds) return;
  if (++failures <= kPrinted) (std::cout << file << ":" << line << ": " << std::setprecision(17) << ... << words) << std::endl;
}

// Within the tolerance, or the same infinity, or both NaN.
inline bool near(double got, double want, double tolerance) {
  return got == want || std::abs(got - want) <= tolerance || (std::isnan(got) && std::isnan(want));
}

// The closing line and the exit status of a test program.
inline int result(const char* program) {
  std::cout << program << ": " << checks << " checks, " << failures << " failed" << std::endl;
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace fusegrad::test

// CHECK(claim, words...) and CHECK_NEAR(got, want, tolerance, words...): the words say which case it is.
#define CHECK(claim, ...) ::fusegrad::test::check(claim, __FILE__, __LINE__, __VA_ARGS__, ": not true: " #claim)
#define CHECK_NEAR(got, want, tolerance, ...)                                                                                      \
  ::fusegrad::test::check(::fusegrad::test::near(got, want, tolerance), __FILE__, __LINE__, __VA_ARGS__, ": got ", got, ", want ", \
                          want, " within ", tolerance)
