// Batch norm with the ReLU or ELU after it, and max pooling, in bfloat16 on a CPU.
// x, y, dy, dx are n rows of c channels (a channels_last image batch), c a multiple of 16; all else is float32 [c].
// Sums are kept in float32 over 256 rows and in float64 beyond, in an order that no number of threads changes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef uint16_t half;
const int V = 16;
const long CHUNK = 256;
typedef float F __attribute__((vector_size(4 * V)));
typedef int32_t I __attribute__((vector_size(4 * V)));
typedef uint32_t U __attribute__((vector_size(4 * V)));
typedef half H __attribute__((vector_size(2 * V)));

template <class T, class P> static inline T get(const P* p) { T t; memcpy(&t, p, sizeof t); return t; }
template <class T, class P> static inline void put(P* p, T t) { memcpy(p, &t, sizeof t); }
static inline F up(const half* p) { return (F)(__builtin_convertvector(get<H>(p), U) << 16); }
static inline void down(half* p, F f) {  // to the nearest, ties to even; a NaN that came from bfloat16 stays one
  U b = (U)f;
  put(p, __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, H));
}
static inline F keep(I where, F f) { return (F)(where & (I)f); }

template <class T> static void each(long n, int c, T work) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < n; r++)
    for (int b = 0; b < c; b += V) work(r * c + b, b);
}

template <class T> static std::vector<double> sums(long n, int c, T term) {  // of two values for each channel: [2c]
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

// An activation of z, and d times its slope there; what is not a number stays one
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
extern "C" void scale_act(int elu, const half* x, half* y, long n, int c, const float* a, const float* t) {
  by(elu, [=](auto act) {
    each(n, c, [=](long at, int b) { down(y + at, act.value(up(x + at) * get<F>(a + b) + get<F>(t + b))); });
  });
}

extern "C" void norm_act(int elu, const half* x, half* y, long n, int c, const float* weight, const float* bias,
                         float eps, float* mean, float* var, float* a, float* t) {
  auto s = sums(n, c, [=](long at, int, F& p, F& q) { F f = up(x + at); p += f, q += f * f; });
  for (int i = 0; i < c; i++) {
    double m = s[i] / n, v = s[c + i] / n - m * m;
    v = v < 0 ? 0 : v;
    mean[i] = m, var[i] = v;
    a[i] = weight[i] / std::sqrt(v + eps), t[i] = bias[i] - m * a[i];
  }
  scale_act(elu, x, y, n, c, a, t);
}

template <class A>
static void backward(A act, const half* dy, const half* x, half* dx, long n, int c, float eps, const float* mean,
                     const float* var, const float* a, const float* t, float* dweight, float* dbias) {
  auto passed = [=](long at, int b, F f) { return act.back(f * get<F>(a + b) + get<F>(t + b), up(dy + at)); };
  auto s = sums(n, c, [=](long at, int b, F& p, F& q) { F f = up(x + at), d = passed(at, b, f); p += d, q += d * f; });
  std::vector<float> g(c), h(c);  // dx = a * d + g * x + h
  for (int i = 0; i < c; i++) {
    double rstd = 1 / std::sqrt((double)var[i] + eps), dx_hat = (s[c + i] - mean[i] * s[i]) * rstd;
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

extern "C" void norm_act_backward(int elu, const half* dy, const half* x, half* dx, long n, int c, float eps,
                                  const float* mean, const float* var, const float* a, const float* t, float* dweight,
                                  float* dbias) {
  by(elu, [=](auto act) { backward(act, dy, x, dx, n, c, eps, mean, var, a, t, dweight, dbias); });
}

// 2 x 2 max pooling of n images [h, w, c], h and w even; `which` of the four was taken: the first of the largest
template <class T> static void windows(long n, int h, int w, int c, T work) {
#pragma omp parallel for schedule(static)
  for (long r = 0; r < n * (h / 2); r++) {
    long in = r * 2 * w * c, out = r * (w / 2) * c;  // a row of windows is two rows of the image
    for (int j = 0; j < w / 2; j++, in += 2 * c, out += c)
      for (int b = 0; b < c; b += V) {
        const long at[4] = {in + b, in + c + b, in + (long)w * c + b, in + (long)w * c + c + b};
        work(at, out + b);
      }
  }
}

extern "C" void pool(const half* x, half* y, half* which, long n, int h, int w, int c) {
  windows(n, h, w, c, [=](const long* in, long out) {
    F m = up(x + in[0]);
    I k = {};
    for (int i = 1; i < 4; i++) {
      F e = up(x + in[i]);
      I g = (e > m) | (e != e);
      m = g ? e : m, k = g ? I{} + i : k;
    }
    put(y + out, __builtin_convertvector((U)m >> 16, H)), put(which + out, __builtin_convertvector(k, H));
  });
}

extern "C" void pool_backward(const half* dy, const half* which, half* dx, long n, int h, int w, int c) {
  windows(n, h, w, c, [=](const long* in, long out) {
    H d = get<H>(dy + out), k = get<H>(which + out);
    for (int i = 0; i < 4; i++) put(dx + in[i], (H)(d & (H)(k == H{} + (half)i)));
  });
}
