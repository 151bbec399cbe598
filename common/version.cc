#include "common/version.h"

namespace walsh {

std::string_view Version() { return WALSH_VERSION; }

std::string_view Revision() { return WALSH_REVISION; }

bool HasCuda() { return WALSH_HAVE_CUDA != 0; }

}  // namespace walsh
