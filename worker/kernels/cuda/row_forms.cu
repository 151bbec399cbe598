#include "common/status_macros.h"
#include "worker/kernels/cuda/cuda_status.h"
#include "worker/kernels/cuda/device_buffer.h"
#include "worker/kernels/cuda/reduce.cuh"
#include "worker/kernels/cuda/row_forms.h"

namespace walsh::kernels::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void Difference(const RowFormsParams p, float* out) {
  const int64_t row = blockIdx.y;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= p.cols) return;
  const int64_t group = row * (p.cols / p.group_size) + c / p.group_size;
  const int code = p.codes[row * p.cols + c];
  const float quantized = p.scales[group] * static_cast<float>(code - p.zeros[group]);
  out[row * p.cols + c] = p.w[row * p.cols + c] - quantized;
}

__global__ void RowDots(const float* a, const float* b, int64_t cols, double* out) {
  __shared__ double scratch[kThreads / kWarpSize];
  double sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
    sum += static_cast<double>(a[blockIdx.x * cols + c]) *
           static_cast<double>(b[blockIdx.x * cols + c]);
  }
  sum = BlockReduce<Sum>(sum, scratch);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// product = m · H, then the dots of m's and product's rows.
absl::Status Form(Context& context, const RowFormsParams& p, const float* m, float* product,
                  double* dots, std::vector<double>& host) {
  const float one = 1.0f;
  const float zero = 0.0f;
  const auto cols = static_cast<int>(p.cols);
  WALSH_CUBLAS_RETURN_IF_ERROR(
      cublasGemmEx(context.blas(), CUBLAS_OP_N, CUBLAS_OP_N, cols, static_cast<int>(p.rows), cols,
                   &one, p.h, CUDA_R_32F, cols, m, CUDA_R_32F, cols, &zero, product, CUDA_R_32F,
                   cols, CUBLAS_COMPUTE_32F_FAST_TF32, CUBLAS_GEMM_DEFAULT));
  RowDots<<<static_cast<unsigned>(p.rows), kThreads, 0, context.stream()>>>(m, product, p.cols,
                                                                            dots);
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("RowDots", context.stream());
  host.resize(static_cast<size_t>(p.rows));
  WALSH_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(host.data(), dots, host.size() * sizeof(double),
                                             cudaMemcpyDeviceToHost, context.stream()));
  WALSH_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(context.stream()));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RowForms> ComputeRowForms(Context& context, const RowFormsParams& params) {
  RowForms forms;
  if (params.rows == 0 || params.cols == 0) return forms;
  const cudaStream_t stream = context.stream();
  const int64_t size = params.rows * params.cols;
  WALSH_ASSIGN_OR_RETURN(auto product, DeviceBuffer<float>::Allocate(size, stream));
  WALSH_ASSIGN_OR_RETURN(auto dots, DeviceBuffer<double>::Allocate(params.rows, stream));
  WALSH_RETURN_IF_ERROR(Form(context, params, params.w, product.data(), dots.data(), forms.output));
  WALSH_ASSIGN_OR_RETURN(auto difference, DeviceBuffer<float>::Allocate(size, stream));
  const dim3 grid(static_cast<unsigned>((params.cols + kThreads - 1) / kThreads),
                  static_cast<unsigned>(params.rows));
  Difference<<<grid, kThreads, 0, stream>>>(params, difference.data());
  WALSH_CUDA_RETURN_IF_LAUNCH_FAILED("Difference", stream);
  WALSH_RETURN_IF_ERROR(
      Form(context, params, difference.data(), product.data(), dots.data(), forms.error));
  return forms;
}

}  // namespace walsh::kernels::cuda
