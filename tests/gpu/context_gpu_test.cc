#include "tests/gpu/gpu_fixture.h"
#include "worker/kernels/cuda/context.h"

namespace walsh::kernels::cuda {
namespace {

using ContextTest = GpuTest;

int PriorityOf(cudaStream_t stream) {
  int priority = 0;
  EXPECT_EQ(cudaStreamGetPriority(stream, &priority), cudaSuccess);
  return priority;
}

TEST_F(ContextTest, ServingComesBeforeJobs) {
  ASSERT_OK_AND_ASSIGN(const auto serving, Context::Create(0, Priority::kServing));
  int least = 0;  // a larger number
  int greatest = 0;
  ASSERT_EQ(cudaDeviceGetStreamPriorityRange(&least, &greatest), cudaSuccess);
  ASSERT_LT(greatest, least);
  EXPECT_EQ(PriorityOf(serving->stream()), greatest);
  EXPECT_EQ(PriorityOf(context().stream()), least);
  EXPECT_EQ(PriorityOf(context().side()), least);
}

}  // namespace
}  // namespace walsh::kernels::cuda
