// Tells ThreadSanitizer what Abseil's locks order. Linked into the tests of the preset `tsan` only.
//
// Debian's Abseil is not instrumented, and its mutex is built on futexes: whatever it guards looks
// like a race. cmake/WalshTarget.cmake routes the calls below through __wrap_* (ld's --wrap; the
// names are mangled, `debian3` being the package's inline namespace), which add the missing edges.
// What a condition variable does to its mutex inside the library is added around the wait.
#include "absl/time/time.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);

void __real__ZN4absl7debian35Mutex4LockEv(void* mutex);
void __wrap__ZN4absl7debian35Mutex4LockEv(void* mutex) {
  __real__ZN4absl7debian35Mutex4LockEv(mutex);
  __tsan_acquire(mutex);
}

void __real__ZN4absl7debian35Mutex6UnlockEv(void* mutex);
void __wrap__ZN4absl7debian35Mutex6UnlockEv(void* mutex) {
  __tsan_release(mutex);
  __real__ZN4absl7debian35Mutex6UnlockEv(mutex);
}

void __real__ZN4absl7debian37CondVar4WaitEPNS0_5MutexE(void* condition, void* mutex);
void __wrap__ZN4absl7debian37CondVar4WaitEPNS0_5MutexE(void* condition, void* mutex) {
  __tsan_release(mutex);
  __real__ZN4absl7debian37CondVar4WaitEPNS0_5MutexE(condition, mutex);
  __tsan_acquire(mutex);
}

bool __real__ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE(
    void* condition, void* mutex, absl::Duration timeout);
bool __wrap__ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE(
    void* condition, void* mutex, absl::Duration timeout) {
  __tsan_release(mutex);
  const bool timed_out =
      __real__ZN4absl7debian37CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE(condition, mutex,
                                                                                  timeout);
  __tsan_acquire(mutex);
  return timed_out;
}

void __real__ZN4absl7debian312Notification6NotifyEv(void* notification);
void __wrap__ZN4absl7debian312Notification6NotifyEv(void* notification) {
  __tsan_release(notification);
  __real__ZN4absl7debian312Notification6NotifyEv(notification);
}

void __real__ZNK4absl7debian312Notification19WaitForNotificationEv(void* notification);
void __wrap__ZNK4absl7debian312Notification19WaitForNotificationEv(void* notification) {
  __real__ZNK4absl7debian312Notification19WaitForNotificationEv(notification);
  __tsan_acquire(notification);
}
}
