// A dense row-major float matrix that owns its memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include "common/check.h"

namespace walsh {

// 64-byte aligned, so that each row of a multiple of 16 columns starts at a vector boundary. Values
// are zero at first: nothing of the heap can reach an artifact.
class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t cols) : rows_(rows), cols_(cols) {
    WALSH_CHECK_GE(rows, 0);
    WALSH_CHECK_GE(cols, 0);
    const auto n = static_cast<size_t>(rows * cols);
    // Aligned by hand: glibc before 2.38 does not reuse what aligned allocation splits off, and a
    // job that makes and drops matrices all the time grew to several times what it needs.
    size_t room = n * sizeof(float) + kAlign;
    void* base = ::operator new(room);
    void* aligned = base;
    std::align(kAlign, n * sizeof(float), aligned, room);
    data_ = {static_cast<float*>(aligned), Free(base)};
    std::uninitialized_fill_n(data_.get(), n, 0.0f);
  }
  Matrix(Matrix&&) noexcept = default;
  Matrix& operator=(Matrix&&) noexcept = default;

  Matrix Copy() const {
    Matrix m(rows_, cols_);
    std::copy_n(data_.get(), size(), m.data_.get());
    return m;
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t size() const { return rows_ * cols_; }
  bool empty() const { return size() == 0; }
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  float* row(int64_t i) { return data_.get() + i * cols_; }
  const float* row(int64_t i) const { return data_.get() + i * cols_; }
  float& operator()(int64_t i, int64_t j) { return data_[static_cast<size_t>(i * cols_ + j)]; }
  float operator()(int64_t i, int64_t j) const { return data_[static_cast<size_t>(i * cols_ + j)]; }
  std::span<float> span() { return {data_.get(), static_cast<size_t>(size())}; }
  std::span<const float> span() const { return {data_.get(), static_cast<size_t>(size())}; }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    Free() : base(nullptr) {}
    explicit Free(void* b) : base(b) {}
    void operator()(float*) const { ::operator delete(base); }
    void* base;
  };
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  std::unique_ptr<float[], Free> data_;
};

}  // namespace walsh
