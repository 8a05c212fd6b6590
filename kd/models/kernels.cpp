// Batch norm fused with a ReLU or ELU, and max pooling, on a CPU: in bfloat16, or with -DFLOAT32 in float32.
// x, y, dy, dx are n rows of c channels (a channels_last image batch), with c a multiple of 16; all other arrays are
// float32 [c]. Sums are in float32 within chunks of 256 rows and in float64 across them. Their order, and so the
// result, does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef FLOAT32
typedef float real;
typedef uint32_t word;  // as wide as a real
#else
typedef uint16_t real;
typedef uint16_t word;
#endif
#ifdef __AVX512F__
const int V = 16;  // the processor's vector width; the compiler would split wider vectors into single numbers
#else
const int V = 8;
#endif
const long CHUNK = 256;
typedef float F __attribute__((vector_size(4 * V)));
typedef int32_t I __attribute__((vector_size(4 * V)));
typedef uint32_t U __attribute__((vector_size(4 * V)));
typedef word W __attribute__((vector_size(sizeof(word) * V)));

template <class T, class P> static inline T get(const P* p) { T t; memcpy(&t, p, sizeof t); return t; }
template <class T, class P> static inline void put(P* p, T t) { memcpy(p, &t, sizeof t); }
#ifdef FLOAT32
static inline F up(const real* p) { return get<F>(p); }
static inline void down(real* p, F f) { put(p, f); }
#else
static inline F up(const real* p) { return (F)(__builtin_convertvector(get<W>(p), U) << 16); }
static inline void down(real* p, F f) {  // rounds to nearest, ties to even; a NaN that came from bfloat16 stays NaN
  U b = (U)f;
  put(p, __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, W));
}
#endif
static inline F keep(I where, F f) { return (F)(where & (I)f); }

template <class T> static void each(long n, int c, T work) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < n; r++)
    for (int b = 0; b < c; b += V) work(r * c + b, b);
}

template <class T> static std::vector<double> sums(long n, int c, T term) {  // of two terms per channel: [2c]
  long chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<float> part(chunks * 2 * c);
#pragma omp parallel for schedule(static)
  for (long k = 0; k < chunks; k++)
    for (int b = 0; b < c; b += V) {
      F p = {}, q = {};
      for (long r = k * CHUNK; r < std::min(n, (k + 1) * CHUNK); r++) term(r * c + b, b, p, q);
      put(&part[k * 2 * c + b], p), put(&part[k * 2 * c + c + b], q);
    }
  std::vector<double> total(2 * c);
  for (long k = 0; k < chunks; k++)
    for (int i = 0; i < 2 * c; i++) total[i] += part[k * 2 * c + i];
  return total;
}

static inline F expm1(F z) {  // for z <= 0: 2^k (e^r - 1) + 2^k - 1, with a series for e^r - 1, |r| <= ln(2) / 2
  z = z > -87 ? z : F{} - 87;
  F k = z * 1.44269504f + 12582912 - 12582912;  // to the nearest integer
  F r = z - k * 0.693359375f + k * 2.12194440e-4f;
  F p = r + r * r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f)))));
  F s = (F)((__builtin_convertvector(k, I) + 127) << 23);
  return p * s + (s - 1);
}

// value: the activation of z; back: d times its derivative at z. NaN stays NaN.
struct Relu {
  static F value(F z) { return keep(!(z <= 0), z); }
  static F back(F z, F d) { return keep(!(z <= 0), d); }
};
struct Elu {
  static F value(F z) { return z <= 0 ? expm1(z) : z; }
  static F back(F z, F d) { return z <= 0 ? d * (expm1(z) + 1) : d; }
};
template <class T> static void by(int elu, T work) { elu ? work(Elu()) : work(Relu()); }

// y = activation(a * x + t)
extern "C" void scale_act(int elu, const real* x, real* y, long n, int c, const float* a, const float* t) {
  by(elu, [=](auto act) {
    each(n, c, [=](long at, int b) { down(y + at, act.value(up(x + at) * get<F>(a + b) + get<F>(t + b))); });
  });
}

extern "C" void norm_act(int elu, const real* x, real* y, long n, int c, const float* weight, const float* bias,
                         float eps, float* mean, float* var, float* a, float* t) {
  // sums of the difference from the first row, so that a mean far from 0 does not cancel the variance
  auto s = sums(n, c, [=](long at, int b, F& p, F& q) { F f = up(x + at) - up(x + b); p += f, q += f * f; });
  std::vector<float> first(c);
  for (int b = 0; b < c; b += V) put(&first[b], up(x + b));
  for (int i = 0; i < c; i++) {
    double far = s[i] / n, m = first[i] + far, v = s[c + i] / n - far * far;
    v = v < 0 ? 0 : v;
    mean[i] = m, var[i] = v;
    a[i] = weight[i] / std::sqrt(v + eps), t[i] = bias[i] - m * a[i];
  }
  scale_act(elu, x, y, n, c, a, t);
}

template <class A>
static void backward(A act, const real* dy, const real* x, real* dx, long n, int c, float eps, const float* mean,
                     const float* var, const float* a, const float* t, float* dweight, float* dbias) {
  auto passed = [=](long at, int b, F f) { return act.back(f * get<F>(a + b) + get<F>(t + b), up(dy + at)); };
  auto s = sums(n, c, [=](long at, int b, F& p, F& q) {
    F f = up(x + at), d = passed(at, b, f);
    p += d, q += d * (f - get<F>(mean + b));
  });
  std::vector<float> g(c), h(c);  // dx = a * d + g * x + h
  for (int i = 0; i < c; i++) {
    double rstd = 1 / std::sqrt((double)var[i] + eps), dx_hat = s[c + i] * rstd;
    dbias[i] = s[i], dweight[i] = dx_hat;
    g[i] = -a[i] * rstd * dx_hat / n;
    h[i] = -a[i] * s[i] / n - g[i] * mean[i];
  }
  const float *gp = g.data(), *hp = h.data();
  each(n, c, [=](long at, int b) {
    F f = up(x + at);
    down(dx + at, get<F>(a + b) * passed(at, b, f) + get<F>(gp + b) * f + get<F>(hp + b));
  });
}

extern "C" void norm_act_backward(int elu, const real* dy, const real* x, real* dx, long n, int c, float eps,
                                  const float* mean, const float* var, const float* a, const float* t, float* dweight,
                                  float* dbias) {
  by(elu, [=](auto act) { backward(act, dy, x, dx, n, c, eps, mean, var, a, t, dweight, dbias); });
}

// 2 x 2 max pooling of n images [h, w, c], with h and w even. `which` is the position of the maximum in its window
// (0 to 3), the first one if there are several.
template <class T> static void windows(long n, int h, int w, int c, T work) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < n * (h / 2); r++) {
    long in = r * 2 * w * c, out = r * (w / 2) * c;  // a row of windows covers two rows of the image
    for (int j = 0; j < w / 2; j++, in += 2 * c, out += c)
      for (int b = 0; b < c; b += V) {
        const long at[4] = {in + b, in + c + b, in + (long)w * c + b, in + (long)w * c + c + b};
        work(at, out + b);
      }
  }
}

extern "C" void pool(const real* x, real* y, real* which, long n, int h, int w, int c) {
  windows(n, h, w, c, [=](const long* in, long out) {
    F m = up(x + in[0]);
    I k = {};
    for (int i = 1; i < 4; i++) {
      F e = up(x + in[i]);
      I g = (e > m) | (e != e);
      m = g ? e : m, k = g ? I{} + i : k;
    }
    down(y + out, m), put(which + out, __builtin_convertvector(k, W));
  });
}

extern "C" void pool_backward(const real* dy, const real* which, real* dx, long n, int h, int w, int c) {
  windows(n, h, w, c, [=](const long* in, long out) {
    W d = get<W>(dy + out), k = get<W>(which + out);
    for (int i = 0; i < 4; i++) put(dx + in[i], (W)(d & (W)(k == W{} + (word)i)));
  });
}
