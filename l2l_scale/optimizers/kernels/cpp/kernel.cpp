// The C interface, loaded with ctypes: no header of torch is needed, so it builds in seconds and for any torch.
//
// Every function returns 0, or 1 when memory ran out.
#include <new>

#include "backward.h"
#include "cell.h"

namespace {

template <class P, class T = typename P::Scalar>
int forward(const L2LProgram* program, const T* weights, int64_t total, const T* grad, const T* state, T* next,
            T* update, int threads) {
  try {
    l2l::forward<P>(*program, weights, total, grad, state, next, update, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

template <class P, class T = typename P::Scalar>
int backward(const L2LProgram* program, const T* weights, int64_t total, int64_t coordinates, int64_t steps,
             const T* grads, const T* loss_weights, const T* d_updates, const T* state, const T* d_state_end,
             T* d_weights, T* d_state, T* d_grads, int threads) {
  try {
    const l2l::WindowAdjoint<T> adjoint{total, coordinates, steps,     grads,   loss_weights, d_updates,
                                        state, d_state_end, d_weights, d_state, d_grads};
    l2l::backward<P>(*program, weights, adjoint, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

template <class P, class T = typename P::Scalar>
int cell_forward(int inputs, int hidden, const T* weights, int64_t total, const T* x, const T* h, const T* c,
                 T* h_after, T* c_after, int threads) {
  try {
    l2l::cell_forward<P>({inputs, hidden}, weights, total, x, h, c, h_after, c_after, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

template <class P, class T = typename P::Scalar>
int cell_backward(int inputs, int hidden, const T* weights, int64_t total, const T* x, const T* h, const T* c,
                  const T* d_h, const T* d_c, T* d_weights, T* d_x, T* d_h_before, T* d_c_before, int threads) {
  try {
    const l2l::CellAdjoint<T> adjoint{total, x, h, c, d_h, d_c, d_weights, d_x, d_h_before, d_c_before};
    l2l::cell_backward<P>({inputs, hidden}, weights, adjoint, threads);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

#define L2L_EXPORT(P, T, suffix)                                                                                \
  extern "C" int l2l_forward_##suffix(const L2LProgram* program, const T* weights, int64_t total, const T* grad, \
                                      const T* state, T* next, T* update, int threads) {                       \
    return forward<P>(program, weights, total, grad, state, next, update, threads);                            \
  }                                                                                                            \
  extern "C" int l2l_backward_##suffix(                                                                        \
      const L2LProgram* program, const T* weights, int64_t total, int64_t coordinates, int64_t steps, const T* grads, \
      const T* loss_weights, const T* d_updates, const T* state, const T* d_state_end, T* d_weights, T* d_state,  \
      T* d_grads, int threads) {                                                                               \
    return backward<P>(program, weights, total, coordinates, steps, grads, loss_weights, d_updates, state,      \
                       d_state_end, d_weights, d_state, d_grads, threads);                                     \
  }                                                                                                            \
  extern "C" int l2l_cell_forward_##suffix(int inputs, int hidden, const T* weights, int64_t total, const T* x,   \
                                           const T* h, const T* c, T* h_after, T* c_after, int threads) {         \
    return cell_forward<P>(inputs, hidden, weights, total, x, h, c, h_after, c_after, threads);                \
  }                                                                                                            \
  extern "C" int l2l_cell_backward_##suffix(int inputs, int hidden, const T* weights, int64_t total, const T* x,  \
                                            const T* h, const T* c, const T* d_h, const T* d_c, T* d_weights,     \
                                            T* d_x, T* d_h_before, T* d_c_before, int threads) {                  \
    return cell_backward<P>(inputs, hidden, weights, total, x, h, c, d_h, d_c, d_weights, d_x, d_h_before,       \
                            d_c_before, threads);                                                              \
  }

L2L_EXPORT(l2l::Exact<float>, float, float32)
L2L_EXPORT(l2l::Exact<double>, double, float64)
#if defined(__AVX512BF16__)
L2L_EXPORT(l2l::Bfloat16, float, bfloat16)
#endif
