//! Batch, group, instance and weight norm, scale and shift, and transposition on the emulator,
//! against loops in f64.
#![allow(unsafe_code)]

use candle_norm_cuda_emulator::{self as emulator, Order, launch};
use candle_norm_cuda_kernels::geometry::channels::{Columns, Planes, update_running};
use candle_norm_cuda_kernels::geometry::groups::Groups;
use candle_norm_cuda_kernels::geometry::transpose::transpose;
use candle_norm_cuda_kernels::geometry::weight::Weight;
use candle_norm_cuda_kernels::{Element, Launch, Types};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use Element::{Bf16, F16, F32, F64};

/// Properties of a type that the tests need.
trait Numbers: Copy {
    /// Half the distance of 1 to the next number.
    fn rounding(self) -> f64;
    /// The error, as a share of the scale, that is allowed in a tensor that is computed in this
    /// type's accumulator.
    fn tolerance(self) -> f64;
    fn bytes(self, v: f64) -> Vec<u8>;
    fn value(self, b: &[u8]) -> f64;
}

impl Numbers for Element {
    fn rounding(self) -> f64 {
        match self {
            F32 => 6e-8,
            F16 => 4.9e-4,
            Bf16 => 3.95e-3,
            F64 => 1.2e-16,
        }
    }
    fn tolerance(self) -> f64 {
        if self == F64 { 1e-13 } else { 2e-6 }
    }
    fn bytes(self, v: f64) -> Vec<u8> {
        match self {
            F32 => (v as f32).to_le_bytes().to_vec(),
            F16 => half::f16::from_f64(v).to_le_bytes().to_vec(),
            Bf16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
            F64 => v.to_le_bytes().to_vec(),
        }
    }
    fn value(self, b: &[u8]) -> f64 {
        match self {
            F32 => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
            F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            Bf16 => half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64(),
            F64 => f64::from_le_bytes(b.try_into().unwrap()),
        }
    }
}

const F32_ONLY: Types = Types::ALL[0];

/// A buffer that begins at a multiple of 16 bytes, and ends in a guard of NaN that nobody may
/// write.
#[derive(Clone, PartialEq)]
struct Buffer {
    kind: Element,
    len: usize,
    words: Vec<u128>,
}

impl Buffer {
    fn of(kind: Element, values: &[f64]) -> Self {
        let mut bytes: Vec<u8> = values.iter().flat_map(|v| kind.bytes(*v)).collect();
        bytes.resize((bytes.len() / 16 + 2) * 16, 0xff);
        let words = bytes
            .chunks_exact(16)
            .map(|b| u128::from_le_bytes(b.try_into().unwrap()));
        Self {
            kind,
            len: values.len(),
            words: words.collect(),
        }
    }
    fn empty(kind: Element, len: usize) -> Self {
        let words = vec![u128::MAX; len * kind.size() / 16 + 2];
        Self { kind, len, words }
    }
    fn elements<T>(&self) -> &[T] {
        // SAFETY: the words have as many bytes, of which all patterns are elements.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }
    fn elements_mut<T>(&mut self) -> &mut [T] {
        // SAFETY: as above, and the words are borrowed as long.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.len) }
    }
    /// The bytes behind the values.
    fn guard(&self) -> (*const u8, usize) {
        let begin = self.len * self.kind.size();
        let bytes = size_of_val(&self.words[..]);
        (
            self.words.as_ptr().cast::<u8>().wrapping_add(begin),
            bytes - begin,
        )
    }
    fn values(&self) -> Vec<f64> {
        let bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let (values, guard) = bytes.split_at(self.len * self.kind.size());
        assert!(guard.iter().all(|b| *b == 0xff), "written past the end");
        values
            .chunks_exact(self.kind.size())
            .map(|b| self.kind.value(b))
            .collect()
    }
}

fn run(l: &Launch, args: Args, order: Order) {
    let Args { inner, guards } = args;
    guard::close(&guards);
    // SAFETY: the arguments are those that the geometry's functions describe, with buffers of
    // their sizes.
    unsafe { launch(&l.kernel, l.grid, l.block, l.shared, inner, order) }
        .unwrap_or_else(|fault| panic!("{}: {fault}", l.kernel));
    guard::open(&guards);
}

/// With AddressSanitizer, a kernel that reads or writes a guard is reported.
mod guard {
    #[cfg(feature = "address-sanitizer")]
    unsafe extern "C" {
        safe fn __asan_poison_memory_region(p: *const u8, len: usize);
        safe fn __asan_unpoison_memory_region(p: *const u8, len: usize);
    }

    #[cfg(feature = "address-sanitizer")]
    pub(super) fn close(guards: &[(*const u8, usize)]) {
        for &(p, len) in guards {
            __asan_poison_memory_region(p, len);
        }
    }

    #[cfg(feature = "address-sanitizer")]
    pub(super) fn open(guards: &[(*const u8, usize)]) {
        for &(p, len) in guards {
            __asan_unpoison_memory_region(p, len);
        }
    }

    #[cfg(not(feature = "address-sanitizer"))]
    pub(super) fn close(_: &[(*const u8, usize)]) {}

    #[cfg(not(feature = "address-sanitizer"))]
    pub(super) fn open(_: &[(*const u8, usize)]) {}
}

/// The emulator's arguments, with the guards of the buffers among them.
#[derive(Default)]
struct Args<'a> {
    inner: emulator::Args<'a>,
    guards: Vec<(*const u8, usize)>,
}

impl<'a> Args<'a> {
    fn new() -> Self {
        Self::default()
    }
    fn read(mut self, b: &'a Buffer) -> Self {
        self.guards.push(b.guard());
        // As many bytes as an element has: a GPU's are compared by elements.
        self.inner = match b.kind.size() {
            2 => self.inner.read(b.elements::<u16>()),
            4 => self.inner.read(b.elements::<u32>()),
            _ => self.inner.read(b.elements::<u64>()),
        };
        self
    }
    fn maybe_read(self, b: Option<&'a Buffer>) -> Self {
        match b {
            Some(b) => self.read(b),
            None => self.null(),
        }
    }
    fn write(mut self, b: &'a mut Buffer) -> Self {
        self.guards.push(b.guard());
        self.inner = match b.kind.size() {
            2 => self.inner.write(b.elements_mut::<u16>()),
            4 => self.inner.write(b.elements_mut::<u32>()),
            _ => self.inner.write(b.elements_mut::<u64>()),
        };
        self
    }
    fn maybe_write(self, b: Option<&'a mut Buffer>) -> Self {
        match b {
            Some(b) => self.write(b),
            None => self.null(),
        }
    }
    fn null(mut self) -> Self {
        self.inner = self.inner.null();
        self
    }
    fn i64(mut self, v: i64) -> Self {
        self.inner = self.inner.i64(v);
        self
    }
    fn i32(mut self, v: i32) -> Self {
        self.inner = self.inner.i32(v);
        self
    }
    fn f64(mut self, v: f64) -> Self {
        self.inner = self.inner.f64(v);
        self
    }
}

fn random(seed: u64, len: usize, mean: f64, kind: Element) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = (0..len).map(|_| {
        let sum: f64 = (0..6).map(|_| rng.random::<f64>() - 0.5).sum();
        mean + sum * 2f64.sqrt()
    });
    values.map(|v| kind.value(&kind.bytes(v))).collect()
}

/// A tensor with channels, and where element (sample, channel, position) of it lies.
#[derive(Clone, Copy, Debug)]
struct Shape {
    n: usize,
    c: usize,
    s: usize,
    last: bool,
}

impl Shape {
    fn len(self) -> usize {
        self.n * self.c * self.s
    }
    fn channel(self, i: usize) -> usize {
        if self.last {
            i % self.c
        } else {
            i / self.s % self.c
        }
    }
    fn sample(self, i: usize) -> usize {
        i / (self.c * self.s)
    }
}

/// Results in f64, with statistics over one of `units` each: `unit(i)` for element `i`.
struct Reference {
    mean: Vec<f64>,
    var: Vec<f64>,
    y: Vec<f64>,
    dx: Vec<f64>,
    dweight: Vec<f64>,
    dbias: Vec<f64>,
}

struct Problem<'a> {
    shape: Shape,
    x: &'a [f64],
    dy: &'a [f64],
    weight: Option<&'a [f64]>,
    bias: Option<&'a [f64]>,
    eps: f64,
    center: bool,
    given: Option<(&'a [f64], &'a [f64])>,
}

impl Problem<'_> {
    fn solve(&self, units: usize, unit: impl Fn(usize) -> usize) -> Reference {
        let mut count = vec![0f64; units];
        let (mut mean, mut var) = (vec![0f64; units], vec![0f64; units]);
        for i in 0..self.x.len() {
            count[unit(i)] += 1.;
        }
        // Twice, so that the mean has all digits of f64.
        for _ in 0..if self.center { 2 } else { 0 } {
            let mut past = vec![0f64; units];
            for (i, x) in self.x.iter().enumerate() {
                past[unit(i)] += (x - mean[unit(i)]) / count[unit(i)];
            }
            mean.iter_mut()
                .zip(past)
                .for_each(|(mean, past)| *mean += past);
        }
        for (i, x) in self.x.iter().enumerate() {
            let d = x - mean[unit(i)];
            var[unit(i)] += d * d / count[unit(i)];
        }
        if let Some((m, v)) = self.given {
            mean = m.to_vec();
            var = v.to_vec();
        }
        let inv: Vec<f64> = var.iter().map(|v| 1. / (v + self.eps).sqrt()).collect();
        let w = |i: usize| self.weight.map_or(1., |w| w[self.shape.channel(i)]);
        let b = |i: usize| self.bias.map_or(0., |b| b[self.shape.channel(i)]);
        let hat = |i: usize| (self.x[i] - mean[unit(i)]) * inv[unit(i)];
        let y = (0..self.x.len()).map(|i| hat(i) * w(i) + b(i)).collect();
        let (mut dweight, mut dbias) = (vec![0.; self.shape.c], vec![0.; self.shape.c]);
        let (mut g_mean, mut g_along) = (vec![0.; units], vec![0.; units]);
        for i in 0..self.x.len() {
            let (c, dy) = (self.shape.channel(i), self.dy[i]);
            dweight[c] += dy * hat(i);
            dbias[c] += dy;
            g_mean[unit(i)] += dy * w(i) / count[unit(i)];
            g_along[unit(i)] += dy * w(i) * hat(i) / count[unit(i)];
        }
        if self.given.is_some() {
            g_mean.fill(0.);
            g_along.fill(0.);
        } else if !self.center {
            g_mean.fill(0.);
        }
        let dx = (0..self.x.len()).map(|i| {
            (self.dy[i] * w(i) - g_mean[unit(i)] - hat(i) * g_along[unit(i)]) * inv[unit(i)]
        });
        let dx = dx.collect();
        Reference {
            mean,
            var,
            y,
            dx,
            dweight,
            dbias,
        }
    }
}

#[track_caller]
fn close(what: &str, kind: Element, got: &[f64], want: &[f64], factor: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f64, |a, v| a.max(v.abs())).max(1e-30);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let most = kind.tolerance() * factor * scale + kind.rounding() * 1.01 * w.abs();
        let subnormal = if kind == F16 { 3e-8 } else { 0. };
        assert!(
            (g - w).abs() <= most + subnormal,
            "{what} {i} of {}: {g} for {w}, {:e} of {scale}",
            want.len(),
            (g - w) / scale
        );
    }
}

/// The numbers of a forward and a backward.
#[derive(Clone, PartialEq)]
struct Done {
    stats: [Buffer; 4],
    y: Buffer,
    dx: Buffer,
    dweight: Buffer,
    dbias: Buffer,
}

/// Inputs in their types.
struct Inputs {
    types: Types,
    x: Buffer,
    dy: Buffer,
    weight: Option<Buffer>,
    bias: Option<Buffer>,
    eps: f64,
    center: bool,
    given: Option<(Buffer, Buffer)>,
}

impl Inputs {
    fn new(types: Types, p: &Problem) -> Self {
        let buffer = |v: &[f64]| Buffer::of(types.param(), v);
        Self {
            types,
            x: Buffer::of(types.x(), p.x),
            dy: Buffer::of(types.x(), p.dy),
            weight: p.weight.map(buffer),
            bias: p.bias.map(buffer),
            eps: p.eps,
            center: p.center,
            given: p.given.map(|(m, v)| {
                let acc = types.x().accumulator();
                (Buffer::of(acc, m), Buffer::of(acc, v))
            }),
        }
    }

    fn done(&self, units: usize, channels: usize) -> Done {
        let (x, p, acc) = (
            self.types.x(),
            self.types.param(),
            self.types.x().accumulator(),
        );
        Done {
            stats: std::array::from_fn(|_| Buffer::empty(acc, units)),
            y: Buffer::empty(x, self.x.len),
            dx: Buffer::empty(x, self.x.len),
            dweight: Buffer::empty(p, channels),
            dbias: Buffer::empty(p, channels),
        }
    }

    /// Mean, rest and the third statistic; whether it is a variance.
    fn by<'a>(&'a self, done: &'a Done) -> (&'a Buffer, Option<&'a Buffer>, &'a Buffer, i32) {
        match &self.given {
            Some((mean, var)) => (mean, None, var, 1),
            None => {
                let [mean, rest, inv_std, _] = &done.stats;
                (mean, Some(rest), inv_std, 0)
            }
        }
    }
}

/// `span` and `period` of the weights.
fn planes(i: &Inputs, p: Planes, weights: (u64, u64), parts: u64, fit: bool, order: Order) -> Done {
    let acc = i.types.x().accumulator();
    let channels = p.channels as usize;
    let mut d = i.done(channels, weights.1 as usize);
    let (outer, c, inner) = (p.outer as i64, p.channels as i64, p.inner as i64);
    let (span, period) = (weights.0 as i64, weights.1 as i64);
    let center = i32::from(i.center);
    let cut = |mut l: Launch| {
        l.grid[0] = (p.channels * parts).div_ceil(u64::from(l.block[1])) as u32;
        l
    };
    let own = i.given.is_none();
    if fit && own {
        let l = p.fit().expect("a channel fits");
        let [mean, rest, inv_std, var] = &mut d.stats;
        let a = Args::new()
            .read(&i.x)
            .maybe_read(i.weight.as_ref())
            .maybe_read(i.bias.as_ref())
            .write(&mut d.y)
            .write(mean)
            .write(rest)
            .write(inv_std)
            .write(var);
        let a = a
            .i64(outer)
            .i64(c)
            .i64(inner)
            .i64(span)
            .i64(period)
            .f64(i.eps)
            .i32(center);
        run(&l, a, order);
    } else {
        if own {
            let mut partial = Buffer::empty(acc, 4 * channels * parts as usize);
            let a = Args::new().read(&i.x).write(&mut partial);
            let a = a.i64(outer).i64(c).i64(inner).i32(parts as i32).i32(center);
            run(&cut(p.moments()), a, order);
            let [mean, rest, inv_std, var] = &mut d.stats;
            let a = Args::new()
                .read(&partial)
                .write(mean)
                .write(rest)
                .write(inv_std)
                .write(var);
            run(&p.merge(), a.i64(c).i32(parts as i32).f64(i.eps), order);
            partial.values();
        }
        let mut y = d.y.clone();
        let (mean, rest, third, of_var) = i.by(&d);
        let a = Args::new()
            .read(&i.x)
            .maybe_read(i.weight.as_ref())
            .maybe_read(i.bias.as_ref())
            .read(mean)
            .maybe_read(rest)
            .read(third)
            .write(&mut y);
        let a = a.i64(outer).i64(c).i64(inner).i64(span).i64(period);
        run(
            &cut(p.normalize()),
            a.i32(parts as i32).i32(of_var).f64(i.eps),
            order,
        );
        d.y = y;
    }
    d
}

/// The backward of a batch norm after `planes`.
fn planes_back(i: &Inputs, p: Planes, parts: u64, fit: bool, order: Order, d: &mut Done) {
    let acc = i.types.x().accumulator();
    let (outer, c, inner) = (p.outer as i64, p.channels as i64, p.inner as i64);
    let center = i32::from(i.center);
    let (mut dx, mut dweight, mut dbias) = (d.dx.clone(), d.dweight.clone(), d.dbias.clone());
    let (mean, rest, third, of_var) = i.by(d);
    if fit && of_var == 0 {
        let a = Args::new()
            .read(&i.x)
            .read(&i.dy)
            .maybe_read(i.weight.as_ref())
            .read(mean)
            .maybe_read(rest)
            .read(third)
            .write(&mut dx)
            .write(&mut dweight)
            .write(&mut dbias)
            .null();
        let l = p.grad_fit().expect("a channel fits");
        run(&l, a.i64(outer).i64(c).i64(inner).i64(c).i32(center), order);
    } else {
        let cut = |mut l: Launch| {
            l.grid[0] = (p.channels * parts).div_ceil(u64::from(l.block[1])) as u32;
            l
        };
        let channels = p.channels as usize;
        let mut partial = Buffer::empty(acc, 2 * channels * parts as usize);
        let a = Args::new().read(&i.x).read(&i.dy).read(mean);
        let a = a.write(&mut partial).i64(outer).i64(c).i64(inner).i64(1);
        run(&cut(p.grad_sums()), a.i32(parts as i32), order);
        partial.values();
        let mut back = [Buffer::empty(acc, channels), Buffer::empty(acc, channels)];
        let [back_mean, back_along] = &mut back;
        let own = of_var == 0;
        let a = Args::new()
            .read(&partial)
            .maybe_read(i.weight.as_ref())
            .read(mean)
            .maybe_read(rest)
            .read(third)
            .write(&mut dweight)
            .write(&mut dbias)
            .maybe_write(own.then_some(back_mean))
            .maybe_write(own.then_some(back_along));
        let a = a.i64(c).i32(parts as i32).f64((p.outer * p.inner) as f64);
        run(&p.grad_merge(), a.i32(of_var).f64(i.eps).i32(center), order);
        let a = Args::new()
            .read(&i.x)
            .read(&i.dy)
            .maybe_read(i.weight.as_ref())
            .read(mean)
            .maybe_read(rest)
            .read(third)
            .maybe_read(own.then_some(&back[0]))
            .maybe_read(own.then_some(&back[1]))
            .write(&mut dx);
        let a = a.i64(outer).i64(c).i64(inner).i64(inner).i64(c);
        run(
            &cut(p.grad_input()),
            a.i32(parts as i32).i32(of_var).f64(i.eps),
            order,
        );
    }
    d.dx = dx;
    d.dweight = dweight;
    d.dbias = dbias;
}

fn matrix<'a>(a: Args<'a>, m: Columns) -> Args<'a> {
    a.i64(m.elements as i64)
        .i64(m.width as i64)
        .i64(m.rows as i64)
        .i64(m.period as i64)
        .i64(m.inner as i64)
}

fn columns(i: &Inputs, m: Columns, order: Order) -> Done {
    let acc = i.types.x().accumulator();
    let channels = (m.period / m.inner) as usize;
    let (across, parts, center) = (m.across as i32, m.parts as i32, i32::from(i.center));
    let mut d = i.done(channels, channels);
    if i.given.is_none() {
        let mut partial = Buffer::empty(acc, m.moments_scratch() as usize);
        let a = matrix(Args::new().read(&i.x).write(&mut partial), m);
        run(&m.moments(), a.i32(across).i32(center), order);
        partial.values();
        let [mean, rest, inv_std, var] = &mut d.stats;
        let a = Args::new()
            .read(&partial)
            .write(mean)
            .write(rest)
            .write(inv_std)
            .write(var);
        run(&m.merge(), matrix(a, m).i32(parts).f64(i.eps), order);
    }
    let (mut y, mut dx) = (d.y.clone(), d.dx.clone());
    let (mut dweight, mut dbias) = (d.dweight.clone(), d.dbias.clone());
    let (mean, rest, third, of_var) = i.by(&d);
    let a = Args::new()
        .read(&i.x)
        .maybe_read(i.weight.as_ref())
        .maybe_read(i.bias.as_ref())
        .read(mean)
        .maybe_read(rest)
        .read(third)
        .write(&mut y);
    run(
        &m.normalize(),
        matrix(a, m).i32(across).i32(of_var).f64(i.eps),
        order,
    );
    let mut partial = Buffer::empty(acc, m.grad_scratch() as usize);
    let a = Args::new().read(&i.x).read(&i.dy).read(mean);
    run(
        &m.grad_sums(),
        matrix(a.write(&mut partial), m).i32(across),
        order,
    );
    partial.values();
    let own = of_var == 0;
    let mut back = [Buffer::empty(acc, channels), Buffer::empty(acc, channels)];
    let [back_mean, back_along] = &mut back;
    let a = Args::new()
        .read(&partial)
        .maybe_read(i.weight.as_ref())
        .read(mean)
        .maybe_read(rest)
        .read(third)
        .write(&mut dweight)
        .write(&mut dbias)
        .maybe_write(own.then_some(back_mean))
        .maybe_write(own.then_some(back_along));
    let count = (m.elements / m.period * m.inner) as f64;
    let a = matrix(a, m)
        .i32(parts)
        .f64(count)
        .i32(of_var)
        .f64(i.eps)
        .i32(center);
    run(&m.grad_merge(), a, order);
    let a = Args::new()
        .read(&i.x)
        .read(&i.dy)
        .maybe_read(i.weight.as_ref())
        .read(mean)
        .maybe_read(rest)
        .read(third)
        .maybe_read(own.then_some(&back[0]))
        .maybe_read(own.then_some(&back[1]))
        .write(&mut dx);
    run(
        &m.grad_input(),
        matrix(a, m).i32(across).i32(of_var).f64(i.eps),
        order,
    );
    d.y = y;
    d.dx = dx;
    d.dweight = dweight;
    d.dbias = dbias;
    d
}

/// The backward of a group norm after `planes`.
fn groups_back(i: &Inputs, g: Groups, parts: u64, fit: bool, order: Order, d: &mut Done) {
    let acc = i.types.x().accumulator();
    let (p, c) = (g.as_planes(), g.as_channels());
    let (mut dx, mut dweight, mut dbias) = (d.dx.clone(), d.dweight.clone(), d.dbias.clone());
    let (mean, rest, inv_std, _) = i.by(d);
    let rest = rest.expect("own statistics");
    let cut = |mut l: Launch, channels: u64| {
        l.grid[0] = (channels * parts).div_ceil(u64::from(l.block[1])) as u32;
        l
    };
    let many = (g.samples * g.channels) as usize;
    let (per_group, inner) = (g.per_group() as i64, g.inner as i64);
    let groups = p.channels as usize;
    let mut back = [Buffer::empty(acc, groups), Buffer::empty(acc, groups)];
    let entries = if fit { 1 } else { parts };
    let mut partial = Buffer::empty(acc, 2 * many * entries as usize);
    if fit {
        let a = Args::new()
            .read(&i.x)
            .read(&i.dy)
            .maybe_read(i.weight.as_ref())
            .read(mean)
            .read(rest)
            .read(inv_std)
            .write(&mut dx)
            .write(&mut partial);
        let a = a
            .i64(per_group)
            .i64(inner)
            .i64(g.num_groups as i64)
            .i32(g.runs() as i32);
        run(&g.grad_fit().expect("a group fits"), a, order);
    } else {
        let a = Args::new().read(&i.x).read(&i.dy).read(mean);
        let a = a
            .write(&mut partial)
            .i64(1)
            .i64(many as i64)
            .i64(inner)
            .i64(per_group);
        run(&cut(c.grad_sums(), c.channels), a.i32(parts as i32), order);
    }
    partial.values();
    let [back_mean, back_along] = &mut back;
    let a = Args::new()
        .read(&partial)
        .maybe_read(i.weight.as_ref())
        .read(mean)
        .read(rest)
        .read(inv_std)
        .write(&mut dweight)
        .write(&mut dbias)
        .maybe_write((!fit).then_some(back_mean))
        .maybe_write((!fit).then_some(back_along));
    let a = a
        .i64(g.samples as i64)
        .i64(g.channels as i64)
        .i64(g.num_groups as i64);
    let a = a.i32(entries as i32).f64(p.inner as f64);
    run(&g.grad_merge(!fit), a, order);
    if !fit {
        let a = Args::new()
            .read(&i.x)
            .read(&i.dy)
            .maybe_read(i.weight.as_ref())
            .read(mean)
            .read(rest)
            .read(inv_std)
            .read(&back[0])
            .read(&back[1])
            .write(&mut dx);
        let a = a.i64(1).i64(p.channels as i64).i64(p.inner as i64);
        let a = a
            .i64(inner)
            .i64(g.num_groups as i64)
            .i32(parts as i32)
            .i32(0)
            .f64(i.eps);
        run(&cut(p.grad_input(), p.channels), a, order);
    }
    d.dx = dx;
    d.dweight = dweight;
    d.dbias = dbias;
}

fn check(name: &str, i: &Inputs, r: &Reference, d: &Done) {
    let (x, p, acc) = (i.types.x(), i.types.param(), i.types.x().accumulator());
    if i.given.is_none() {
        let [mean, rest, inv_std, var] = &d.stats;
        let sum = mean
            .values()
            .iter()
            .zip(rest.values())
            .map(|(a, b)| a + b)
            .collect::<Vec<_>>();
        let sigma = r.var.iter().fold(0f64, |a, v| a.max(v.sqrt()));
        let off = sum
            .iter()
            .zip(&r.mean)
            .fold(0f64, |a, (g, w)| a.max((g - w).abs()));
        let most = r.mean.iter().fold(0f64, |a, m| a.max(m.abs()));
        let allowed = acc.tolerance() * sigma + 2. * f64::EPSILON * most;
        assert!(off <= allowed, "{name}: mean is off by {off} at σ {sigma}");
        close(&format!("{name}: var"), acc, &var.values(), &r.var, 1.);
        let inv: Vec<f64> = r.var.iter().map(|v| 1. / (v + i.eps).sqrt()).collect();
        close(&format!("{name}: 1/σ"), acc, &inv_std.values(), &inv, 1.);
    }
    close(&format!("{name}: y"), x, &d.y.values(), &r.y, 1.);
    close(&format!("{name}: dx"), x, &d.dx.values(), &r.dx, 1.);
    close(
        &format!("{name}: dweight"),
        p,
        &d.dweight.values(),
        &r.dweight,
        1.,
    );
    close(
        &format!("{name}: dbias"),
        p,
        &d.dbias.values(),
        &r.dbias,
        1.,
    );
}

/// Values of the type, so that the reference sees what the kernel sees.
struct Values {
    x: Vec<f64>,
    dy: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Values {
    fn new(shape: Shape, types: Types, mean: f64) -> Self {
        let seed = (shape.n * 31 + shape.c * 7 + shape.s) as u64;
        Self {
            x: random(seed, shape.len(), mean, types.x()),
            dy: random(seed + 1, shape.len(), 0., types.x()),
            weight: random(seed + 2, shape.c, 1., types.param()),
            bias: random(seed + 3, shape.c, 0., types.param()),
        }
    }
    fn problem(&self, shape: Shape) -> Problem<'_> {
        Problem {
            shape,
            x: &self.x,
            dy: &self.dy,
            weight: Some(&self.weight),
            bias: Some(&self.bias),
            eps: 1e-5,
            center: true,
            given: None,
        }
    }
}

fn same_in_all_orders(name: &str, of: impl Fn(Order) -> Done) -> Done {
    let [first, second, third] = Order::ALL.map(of);
    assert!(
        first == second && first == third,
        "{name}: the order of threads shows"
    );
    first
}

fn batch_planes(name: &str, shape: Shape, i: &Inputs, r: &Reference, parts: &[u64]) {
    let [outer, channels, inner] = [shape.n, shape.c, shape.s].map(|v| v as u64);
    let p = Planes {
        types: i.types,
        outer,
        channels,
        inner,
    };
    let weights = (p.inner, p.channels);
    for parts in parts {
        let name = format!("{name} in {parts} parts");
        let d = same_in_all_orders(&name, |order| {
            let mut d = planes(i, p, weights, *parts, false, order);
            planes_back(i, p, *parts, false, order, &mut d);
            d
        });
        check(&name, i, r, &d);
    }
    if p.fit().is_some() && p.grad_fit().is_some() && i.given.is_none() {
        let d = same_in_all_orders(name, |order| {
            let mut d = planes(i, p, weights, 1, true, order);
            planes_back(i, p, 1, true, order, &mut d);
            d
        });
        check(&format!("{name} in one launch"), i, r, &d);
    }
}

fn batch_columns(name: &str, shape: Shape, i: &Inputs, r: &Reference, parts: &[u64]) {
    let (rows, inner) = if shape.last {
        (shape.n * shape.s, 1)
    } else {
        (shape.n, shape.s)
    };
    for parts in parts {
        let mut m = Columns::new(i.types, rows as u64, shape.c as u64, inner as u64);
        m.parts = if *parts == 0 { m.parts } else { *parts };
        let name = format!("{name} in {parts} parts");
        let d = same_in_all_orders(&name, |order| columns(i, m, order));
        check(&name, i, r, &d);
    }
}

const fn shape(n: usize, c: usize, s: usize) -> Shape {
    Shape {
        n,
        c,
        s,
        last: false,
    }
}

#[test]
fn batch_norm_along_planes() {
    for types in Types::ALL {
        let all = [
            shape(3, 3, 49),
            shape(2, 3, 64),
            shape(5, 1, 33),
            shape(1, 2, 700),
            shape(2, 40, 17),
        ];
        for shape in &all[..if types == F32_ONLY { 5 } else { 2 }] {
            let shape = *shape;
            let v = Values::new(shape, types, 0.5);
            let p = v.problem(shape);
            let i = Inputs::new(types, &p);
            let r = p.solve(shape.c, |k| shape.channel(k));
            batch_planes(&format!("{} {shape:?}", types.name()), shape, &i, &r, &[3]);
        }
    }
}

#[test]
fn batch_norm_of_large_channels() {
    let half = Types::ALL[3];
    for (types, shape) in [(F32_ONLY, shape(3, 2, 5001)), (half, shape(2, 65, 3137))] {
        let v = Values::new(shape, types, 0.5);
        let p = v.problem(shape);
        let i = Inputs::new(types, &p);
        let r = p.solve(shape.c, |k| shape.channel(k));
        batch_planes(&format!("{} {shape:?}", types.name()), shape, &i, &r, &[2]);
    }
}

#[test]
fn batch_norm_down_columns() {
    for types in Types::ALL {
        let all = [
            shape(40, 3, 7),
            Shape {
                n: 2,
                c: 3,
                s: 45,
                last: true,
            },
            Shape {
                n: 2,
                c: 264,
                s: 9,
                last: true,
            },
            shape(9, 5, 1),
            shape(70, 33, 1),
            shape(2, 300, 2),
            Shape {
                n: 3,
                c: 64,
                s: 20,
                last: true,
            },
            Shape {
                n: 1,
                c: 1,
                s: 50,
                last: true,
            },
        ];
        for shape in &all[..if types == F32_ONLY { 8 } else { 3 }] {
            let shape = *shape;
            let v = Values::new(shape, types, 0.5);
            let p = v.problem(shape);
            let i = Inputs::new(types, &p);
            let r = p.solve(shape.c, |k| shape.channel(k));
            batch_columns(&format!("{} {shape:?}", types.name()), shape, &i, &r, &[2]);
        }
    }
}

#[test]
fn a_mean_of_a_thousand_sigma() {
    let wide = Types::ALL[5];
    for (last, types) in [
        (false, F32_ONLY),
        (true, F32_ONLY),
        (false, wide),
        (true, wide),
    ] {
        let shape = Shape {
            n: 6,
            c: 3,
            s: 400,
            last,
        };
        let v = Values::new(shape, types, 1000.);
        let p = v.problem(shape);
        let i = Inputs::new(types, &p);
        let r = p.solve(shape.c, |k| shape.channel(k));
        let name = format!("{} last {last}", types.name());
        if last {
            batch_columns(&name, shape, &i, &r, &[0, 2]);
        } else {
            batch_planes(&name, shape, &i, &r, &[1, 2]);
        }
    }
}

#[test]
fn about_zero_and_without_parameters() {
    for last in [false, true] {
        let shape = Shape {
            n: 3,
            c: 5,
            s: 50,
            last,
        };
        let v = Values::new(shape, F32_ONLY, 0.5);
        let p = Problem {
            center: false,
            weight: None,
            bias: None,
            ..v.problem(shape)
        };
        let i = Inputs::new(F32_ONLY, &p);
        let r = p.solve(shape.c, |k| shape.channel(k));
        match last {
            true => batch_columns("about zero", shape, &i, &r, &[0]),
            false => batch_planes("about zero", shape, &i, &r, &[1, 2]),
        }
    }
}

#[test]
fn by_given_statistics() {
    for types in Types::ALL {
        for last in [false, true] {
            let shape = Shape {
                n: 2,
                c: 6,
                s: 50,
                last,
            };
            let v = Values::new(shape, types, 0.5);
            let acc = types.x().accumulator();
            let mean = random(9, shape.c, 0.5, acc);
            let var: Vec<f64> = random(8, shape.c, 0., acc)
                .iter()
                .map(|v| v * v + 0.5)
                .collect();
            let var: Vec<f64> = var.iter().map(|v| acc.value(&acc.bytes(*v))).collect();
            let p = Problem {
                given: Some((&mean, &var)),
                ..v.problem(shape)
            };
            let i = Inputs::new(types, &p);
            let r = p.solve(shape.c, |k| shape.channel(k));
            match last {
                true => batch_columns(types.name(), shape, &i, &r, &[0, 2]),
                false => batch_planes(types.name(), shape, &i, &r, &[1, 2]),
            }
        }
    }
}

#[test]
fn group_and_instance_norm() {
    for types in Types::ALL {
        let all = [
            (shape(2, 6, 49), 3),
            (shape(2, 12, 1), 2),
            (shape(3, 4, 64), 4),
            (shape(2, 4, 16), 1),
            (shape(1, 6, 3), 2),
            (shape(1, 80, 20), 2),
            (shape(1, 2, 1100), 1),
        ];
        for (shape, num_groups) in &all[..if types == F32_ONLY { 7 } else { 2 }] {
            let (shape, num_groups) = (*shape, *num_groups);
            let v = Values::new(shape, types, 0.5);
            let p = v.problem(shape);
            let i = Inputs::new(types, &p);
            let per = shape.c / num_groups;
            let r = p.solve(shape.n * num_groups, |k| {
                shape.sample(k) * num_groups + shape.channel(k) / per
            });
            let g = Groups {
                types,
                samples: shape.n as u64,
                channels: shape.c as u64,
                inner: shape.s as u64,
                num_groups: num_groups as u64,
            };
            check_groups(&i, g, &r);
        }
    }
}

/// Several launches, and one where a group fits.
fn check_groups(i: &Inputs, g: Groups, r: &Reference) {
    let weights = (g.inner, g.num_groups);
    for (parts, fit) in [(3, false), (1, true)] {
        let p = g.as_planes();
        if fit && (p.fit().is_none() || g.grad_fit().is_none()) {
            continue;
        }
        let name = format!("{g:?}, {parts} parts, fit {fit}");
        let d = same_in_all_orders(&name, |order| {
            let mut d = planes(i, p, weights, parts, fit, order);
            d.dweight = Buffer::empty(g.types.param(), g.channels as usize);
            d.dbias = Buffer::empty(g.types.param(), g.channels as usize);
            groups_back(i, g, parts, fit, order, &mut d);
            d
        });
        check(&name, i, r, &d);
    }
}

#[test]
fn weights_of_each_channel_of_each_sample() {
    for types in Types::ALL {
        for (whole, num_groups) in [(shape(3, 6, 49), 3), (shape(2, 4, 64), 1)] {
            // Weights are counted through all samples, groups are those of a sample.
            let spread = shape(1, whole.n * whole.c, whole.s);
            let v = Values::new(spread, types, 0.5);
            let p = v.problem(spread);
            let per = whole.c / num_groups;
            let r = p.solve(whole.n * num_groups, |k| {
                whole.sample(k) * num_groups + whole.channel(k) / per
            });
            let g = Groups {
                types,
                samples: whole.n as u64,
                channels: whole.c as u64,
                inner: whole.s as u64,
                num_groups: num_groups as u64,
            };
            check_groups(&Inputs::new(types, &p), g.by_sample(), &r);
        }
    }
}

fn dims(a: Args<'_>, p: Planes) -> Args<'_> {
    a.i64(p.outer as i64)
        .i64(p.channels as i64)
        .i64(p.inner as i64)
}

/// Batch norm with weights of each channel of each sample, by several launches.
fn batch_by_sample(i: &Inputs, p: Planes, order: Order) -> Done {
    let (q, acc) = (p.by_sample(), p.types.x().accumulator());
    let planes = q.channels as usize;
    let mut d = i.done(planes, planes);
    let of_channels = |n: u64| Buffer::empty(acc, (n * p.channels) as usize);
    let mut partial = Buffer::empty(acc, p.moments_scratch() as usize);
    let a = dims(Args::new().read(&i.x).write(&mut partial), p);
    run(&p.moments(), a.i32(p.parts() as i32).i32(1), order);
    let [mut mean, mut rest, mut inv_std, mut var] = [1; 4].map(of_channels);
    let a = Args::new()
        .read(&partial)
        .write(&mut mean)
        .write(&mut rest)
        .write(&mut inv_std)
        .write(&mut var);
    let a = a.i64(p.channels as i64).i32(p.parts() as i32).f64(i.eps);
    run(&p.merge(), a, order);
    let mut spread = Buffer::empty(acc, 3 * planes);
    let a = Args::new().read(&mean).read(&rest).read(&inv_std);
    let a = a.write(&mut spread);
    let a = a.i64(p.outer as i64).i64(p.channels as i64);
    run(&p.spread(), a, order);
    let spread = spread.values();
    let of_planes: Vec<Buffer> = spread
        .chunks(planes)
        .map(|values| Buffer::of(acc, values))
        .collect();
    let parts = q.parts() as i32;
    let a = Args::new()
        .read(&i.x)
        .maybe_read(i.weight.as_ref())
        .maybe_read(i.bias.as_ref())
        .read(&of_planes[0])
        .read(&of_planes[1])
        .read(&of_planes[2])
        .write(&mut d.y);
    let a = dims(a, q).i64(q.inner as i64).i64(q.channels as i64);
    run(&q.normalize(), a.i32(parts).i32(0).f64(i.eps), order);
    let mut partial = Buffer::empty(acc, q.grad_scratch() as usize);
    let a = Args::new().read(&i.x).read(&i.dy).read(&of_planes[0]);
    let a = dims(a.write(&mut partial), q).i64(1).i32(parts);
    run(&q.grad_sums(), a, order);
    let [mut back_mean, mut back_along] = [0; 2].map(|_| Buffer::empty(acc, planes));
    let a = Args::new()
        .read(&partial)
        .maybe_read(i.weight.as_ref())
        .read(&mean)
        .read(&rest)
        .read(&inv_std)
        .write(&mut d.dweight)
        .write(&mut d.dbias)
        .write(&mut back_mean)
        .write(&mut back_along);
    let a = a.i64(p.outer as i64).i64(p.channels as i64).i32(parts);
    let a = a.f64((p.outer * p.inner) as f64).i32(0).f64(i.eps).i32(1);
    run(&p.grad_merge_by_sample(), a, order);
    let a = Args::new()
        .read(&i.x)
        .read(&i.dy)
        .maybe_read(i.weight.as_ref())
        .read(&of_planes[0])
        .read(&of_planes[1])
        .read(&of_planes[2])
        .read(&back_mean)
        .read(&back_along)
        .write(&mut d.dx);
    let a = dims(a, q).i64(q.inner as i64).i64(q.channels as i64);
    run(&q.grad_input(), a.i32(parts).i32(0).f64(i.eps), order);
    d.stats = [mean, rest, inv_std, var];
    d
}

#[test]
fn batch_norm_with_weights_of_each_sample() {
    for types in Types::ALL {
        for whole in [shape(3, 5, 49), shape(37, 3, 16), shape(2, 1, 9000)] {
            if whole.s > 1000 && types != F32_ONLY {
                continue;
            }
            let spread = shape(1, whole.n * whole.c, whole.s);
            let v = Values::new(spread, types, 0.5);
            let p = v.problem(spread);
            let r = p.solve(whole.c, |k| whole.channel(k));
            let i = Inputs::new(types, &p);
            let p = Planes {
                types,
                outer: whole.n as u64,
                channels: whole.c as u64,
                inner: whole.s as u64,
            };
            let name = format!("{p:?} by sample");
            let d = same_in_all_orders(&name, |order| batch_by_sample(&i, p, order));
            check(&name, &i, &r, &d);
        }
    }
}

#[test]
fn a_list_of_several_lines_is_the_same_list() {
    // Three lines of blocks, the last with blocks beyond the end, as where a grid is too narrow.
    let folded = |l: Launch| {
        let [blocks, 1, 1] = l.grid else {
            panic!("{l:?} is folded")
        };
        Launch {
            grid: [blocks.div_ceil(3) + 1, 3, 1],
            ..l
        }
    };
    let (types, n) = (F32_ONLY, 10 * 7 * 30);
    let [x, dy] = [1, 2].map(|seed| Buffer::of(F32, &random(seed, n, 0.5, F32)));
    let p = Planes {
        types,
        outer: 10,
        channels: 7,
        inner: 30,
    };
    let all = [false, true].map(|fold| {
        let of = |l: Launch| if fold { folded(l) } else { l };
        let mut partial = Buffer::empty(F32, 4 * 7);
        let a = Args::new().read(&x).write(&mut partial);
        let a = a.i64(10).i64(7).i64(30).i32(1).i32(1);
        run(&of(p.moments()), a, Order::Ascending);
        let mut stats = [0; 4].map(|_| Buffer::empty(F32, 7));
        let [mean, rest, inv_std, var] = &mut stats;
        let a = Args::new().read(&partial).write(mean).write(rest);
        let a = a.write(inv_std).write(var).i64(7).i32(1).f64(1e-5);
        run(&of(p.merge()), a, Order::Ascending);
        let mut y = Buffer::empty(F32, n);
        let a = Args::new().read(&x).null().null().read(&stats[0]);
        let a = a.read(&stats[1]).read(&stats[2]).write(&mut y);
        let a = a.i64(10).i64(7).i64(30).i64(30).i64(7);
        run(
            &of(p.normalize()),
            a.i32(1).i32(0).f64(1e-5),
            Order::Ascending,
        );
        let mut sums = Buffer::empty(F32, 2 * 7);
        let a = Args::new().read(&x).read(&dy).read(&stats[0]);
        let a = a.write(&mut sums).i64(10).i64(7).i64(30).i64(1).i32(1);
        run(&of(p.grad_sums()), a, Order::Ascending);
        [stats.to_vec(), vec![partial, y, sums]].concat()
    });
    assert!(all[0] == all[1]);
    for b in &all[0] {
        assert!(b.values().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn nan_and_infinity_stay_in_their_channel() {
    for bad in [f64::NAN, f64::INFINITY] {
        for last in [false, true] {
            let shape = Shape {
                n: 2,
                c: 3,
                s: 40,
                last,
            };
            let mut v = Values::new(shape, F32_ONLY, 0.);
            let at = (0..shape.len())
                .position(|k| shape.channel(k) == 1)
                .unwrap();
            v.x[at] = bad;
            let p = v.problem(shape);
            let i = Inputs::new(F32_ONLY, &p);
            let types = F32_ONLY;
            let y = if last {
                columns(&i, Columns::new(types, 80, 3, 1), Order::Ascending).y
            } else {
                let p = Planes {
                    types,
                    outer: 2,
                    channels: 3,
                    inner: 40,
                };
                let split = planes(&i, p, (40, 3), 2, false, Order::Ascending).y;
                let one = planes(&i, p, (40, 3), 1, true, Order::Ascending).y;
                let nan = |b: &Buffer| b.values().iter().map(|v| v.is_nan()).collect::<Vec<_>>();
                assert_eq!(nan(&split), nan(&one));
                split
            };
            for (k, y) in y.values().iter().enumerate() {
                assert_eq!(y.is_nan(), shape.channel(k) == 1, "{k}: {y}");
            }
        }
    }
}

#[test]
fn extreme_and_constant_values() {
    for last in [false, true] {
        let shape = Shape {
            n: 2,
            c: 3,
            s: 70,
            last,
        };
        let mut v = Values::new(shape, F32_ONLY, 0.);
        for (k, x) in v.x.iter_mut().enumerate() {
            *x = match shape.channel(k) {
                0 => 1e15 * if k % 2 == 0 { 1. } else { -1. },
                1 => 3.,
                _ => *x,
            };
            *x = F32.value(&F32.bytes(*x));
        }
        let p = v.problem(shape);
        let i = Inputs::new(F32_ONLY, &p);
        let r = p.solve(shape.c, |k| shape.channel(k));
        let d = if last {
            columns(&i, Columns::new(F32_ONLY, 140, 3, 1), Order::Ascending)
        } else {
            let p = Planes {
                types: F32_ONLY,
                outer: 2,
                channels: 3,
                inner: 70,
            };
            planes(&i, p, (70, 3), 3, false, Order::Ascending)
        };
        let y = d.y.values();
        close("y", F32, &y, &r.y, 1.);
        for (k, y) in y.iter().enumerate() {
            assert!(
                shape.channel(k) != 1 || *y == v.bias[1],
                "a constant channel is its bias"
            );
        }
    }
}

/// Running statistics after a batch of `samples` samples with statistics of their own.
fn running(acc: Element, samples: usize, momentum: f64, tracked: Option<i64>) -> [Vec<f64>; 3] {
    let all = |v: [f64; 4]| Buffer::of(acc, &v[..2 * samples]);
    let mean = all([1., -2., 3., 0.]);
    let rest = all([1e-9, 0., 0., 0.]);
    let var = all([4., 0.5, 2., 1.5]);
    let mut running_mean = Buffer::of(acc, &[0.5, 3.]);
    let mut running_var = Buffer::of(acc, &[1., 2.]);
    // As long as an f64.
    let mut counter = Buffer::of(F64, &[0.]);
    counter.words[0] = tracked.unwrap_or(0) as u128;
    let a = Args::new();
    let a = a.read(&mean).read(&rest).read(&var);
    let a = a.write(&mut running_mean).write(&mut running_var);
    let a = a.maybe_write(tracked.map(|_| &mut counter));
    let l = update_running(2, tracked.is_some(), acc);
    let a = a.i64(2).i64(samples as i64).f64(momentum).f64(10. / 9.);
    run(&l, a, Order::Ascending);
    let counted = counter.words[0] as f64;
    [running_mean.values(), running_var.values(), vec![counted]]
}

#[test]
fn running_statistics() {
    for acc in [F32, F64] {
        let [mean, var, _] = running(acc, 1, 0.1, None);
        close("mean", acc, &mean, &[0.55 + 1e-10, 2.7 - 0.2], 1.);
        close("var", acc, &var, &[0.9 + 0.4 / 0.9, 1.8 + 0.05 / 0.9], 1.);
        // The mean over the samples, as instance norm has it.
        let [mean, var, _] = running(acc, 2, 0.5, None);
        close("mean", acc, &mean, &[1.25 + 2.5e-10, 1.], 1.);
        close("var", acc, &var, &[0.5 + 1.5 / 0.9, 1. + 0.5 / 0.9], 1.);
        // Cumulative: the fourth batch has a quarter.
        let [mean, _, counted] = running(acc, 1, -1., Some(3));
        close("mean", acc, &mean, &[0.625 + 2.5e-10, 1.75], 1.);
        assert_eq!(counted, [4.]);
    }
}

fn weight_norm(types: Types, v: &[f64], dw: &[f64], g: &[f64], len: usize) -> [Buffer; 3] {
    let (x, p, acc) = (types.x(), types.param(), types.x().accumulator());
    let l = Weight {
        types,
        rows: g.len() as u64,
        len: len as u64,
    };
    let all = Order::ALL.map(|order| {
        let [v, dw] = [v, dw].map(|v| Buffer::of(x, v));
        let g = Buffer::of(p, g);
        let [mut w, mut dv] = [0; 2].map(|_| Buffer::empty(x, v.len));
        let [mut norm, mut scale] = [0; 2].map(|_| Buffer::empty(acc, g.len));
        let mut dg = Buffer::empty(p, g.len);
        let a = Args::new().read(&v).read(&g).write(&mut w);
        let a = a.write(&mut norm).write(&mut scale);
        let a = a.i64(g.len as i64).i64(len as i64);
        run(&l.forward(), a.i32(0).f64(0.).null(), order);
        let a = Args::new().read(&v).read(&dw).read(&g).read(&norm);
        let a = a.read(&scale).write(&mut dv).write(&mut dg);
        run(&l.backward(), a.i64(g.len as i64).i64(len as i64), order);
        [w, dv, dg]
    });
    assert!(
        all[0] == all[1] && all[0] == all[2],
        "the order of threads shows"
    );
    all.into_iter().next().unwrap()
}

#[test]
fn rows_of_a_weight() {
    for types in Types::ALL {
        for (rows, len, size) in [
            (9, 33, 1.),
            (3, 1100, 1.),
            (2, 5, 1e-20),
            (3, 1, 1.),
            (2, 40, 1e19),
        ] {
            let half = types.x().size() == 2;
            let size = if half { 1. } else { size };
            let v: Vec<f64> = random(1, rows * len, 0.1, types.x())
                .iter()
                .map(|v| v * size)
                .collect();
            let v: Vec<f64> = v
                .iter()
                .map(|v| types.x().value(&types.x().bytes(*v)))
                .collect();
            let dw = random(2, rows * len, 0., types.x());
            let g = random(3, rows, 1., types.param());
            let (mut w, mut dv, mut dg) = (vec![], vec![], vec![]);
            for (r, g) in g.iter().enumerate() {
                let (v, dw) = (&v[r * len..][..len], &dw[r * len..][..len]);
                let norm = v.iter().map(|v| v * v).sum::<f64>().sqrt();
                let along = v.iter().zip(dw).map(|(v, d)| v * d).sum::<f64>() / norm;
                w.extend(v.iter().map(|v| g * v / norm));
                dv.extend(
                    v.iter()
                        .zip(dw)
                        .map(|(v, d)| g / norm * (d - along * v / norm)),
                );
                dg.push(along);
            }
            let got = weight_norm(types, &v, &dw, &g, len);
            let name = format!("{} {rows} {len} {size}", types.name());
            close(&format!("{name}: w"), types.x(), &got[0].values(), &w, 1.);
            close(
                &format!("{name}: dg"),
                types.param(),
                &got[2].values(),
                &dg,
                1.,
            );
            if len > 1 {
                close(&format!("{name}: dv"), types.x(), &got[1].values(), &dv, 2.);
            }
        }
    }
}

#[test]
fn rows_of_zeros_and_of_what_is_not_finite() {
    let v = [
        0.,
        0.,
        0.,
        f64::INFINITY,
        1.,
        2.,
        f64::NAN,
        1.,
        2.,
        3.,
        4.,
        0.,
    ];
    let [w, dv, dg] = weight_norm(F32_ONLY, &v, &[1.; 12], &[2.; 4], 3);
    let (w, dv, dg) = (w.values(), dv.values(), dg.values());
    assert_eq!((&w[..3], &dv[..3], dg[0]), (&[0.; 3][..], &[0.; 3][..], 0.));
    assert!(w[3].is_nan() && w[4] == 0. && w[6..9].iter().all(|w| w.is_nan()));
    close("w", F32, &w[9..], &[1.2, 1.6, 0.], 1.);
}

#[test]
fn scale_and_shift_is_normalization_without_statistics() {
    for types in [Types::ALL[0], Types::ALL[3]] {
        // By channel, by sample and channel, by column.
        for (shape, period, by_column) in [
            (shape(3, 4, 37), 4, false),
            (shape(3, 4, 37), 12, false),
            (shape(9, 33, 1), 33, true),
        ] {
            let v = Values::new(
                Shape {
                    n: 1,
                    c: period,
                    s: shape.len() / period,
                    last: false,
                },
                types,
                0.5,
            );
            let i = Buffer::of(types.x(), &v.x);
            let [w, b] = [&v.weight, &v.bias].map(|v| Buffer::of(types.param(), v));
            let mut y = Buffer::empty(types.x(), shape.len());
            let a = Args::new().read(&i).read(&w).read(&b).null().null().null();
            let a = a.write(&mut y);
            if by_column {
                let m = Columns::new(types, 9, 33, 1);
                let a = matrix(a, m).i32(m.across as i32).i32(0).f64(0.);
                run(&m.normalize(), a, Order::Descending);
            } else {
                let channels = (shape.n * shape.c) as u64;
                let p = Planes {
                    types,
                    outer: 1,
                    channels,
                    inner: shape.s as u64,
                };
                let a = a
                    .i64(1)
                    .i64(12)
                    .i64(37)
                    .i64(37)
                    .i64(period as i64)
                    .i32(1)
                    .i32(0)
                    .f64(0.);
                run(&p.normalize(), a, Order::Descending);
            }
            let pair = |k: usize| if by_column { k % 33 } else { k / 37 % period };
            let want =
                v.x.iter()
                    .enumerate()
                    .map(|(k, x)| x * v.weight[pair(k)] + v.bias[pair(k)]);
            close("y", types.x(), &y.values(), &want.collect::<Vec<_>>(), 1.);
        }
    }
}

#[test]
fn every_element_changes_places() {
    for (element, [outer, rows, columns]) in [
        (F32, [2, 3, 5]),
        (F16, [1, 33, 70]),
        (F64, [3, 32, 31]),
        (Bf16, [2, 1, 40]),
    ] {
        let x: Vec<f64> = (0..outer * rows * columns)
            .map(|v| (v % 251) as f64)
            .collect();
        let from = Buffer::of(element, &x);
        let mut to = Buffer::empty(element, x.len());
        let dims = [outer, rows, columns].map(|v| v as i64);
        let a = Args::new().read(&from).write(&mut to);
        let l = transpose(element, outer as u64, rows as u64, columns as u64);
        run(
            &l,
            a.i64(dims[0]).i64(dims[1]).i64(dims[2]),
            Order::Shuffled(3),
        );
        for (k, y) in to.values().iter().enumerate() {
            let (o, c, r) = (k / (rows * columns), k / rows % columns, k % rows);
            assert_eq!(*y, x[(o * rows + r) * columns + c]);
        }
    }
}

/// `b` moved on by one element, so that it begins at no multiple of 16 bytes.
fn moved(b: &Buffer) -> (Buffer, usize) {
    let mut values = vec![0.];
    values.extend(b.values());
    (Buffer::of(b.kind, &values), b.kind.size())
}

#[test]
fn an_input_that_begins_anywhere_gives_the_same_bits() {
    for types in [Types::ALL[0], Types::ALL[1]] {
        let shape = shape(2, 3, 50);
        let v = Values::new(shape, types, 0.5);
        let p = v.problem(shape);
        let i = Inputs::new(types, &p);
        let planes_of = Planes {
            types,
            outer: 2,
            channels: 3,
            inner: 50,
        };
        let aligned = planes(&i, planes_of, (50, 3), 1, true, Order::Ascending);
        let (x, by) = moved(&i.x);
        let mut d = i.done(3, 3);
        let bytes: Vec<u8> = x.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let mut room = vec![0u128; bytes.len() / 16 + 1];
        // SAFETY: `room` has as many bytes, and every pattern is one of u8.
        let room =
            unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), bytes.len()) };
        room.copy_from_slice(&bytes);
        let [mean, rest, inv_std, var] = &mut d.stats;
        let a = candle_norm_cuda_emulator::Args::new()
            .read(&room[by..])
            .read(&i.weight.as_ref().unwrap().words)
            .read(&i.bias.as_ref().unwrap().words)
            .write(&mut d.y.words)
            .write(&mut mean.words)
            .write(&mut rest.words)
            .write(&mut inv_std.words)
            .write(&mut var.words);
        let a = a.i64(2).i64(3).i64(50).i64(50).i64(3).f64(i.eps).i32(1);
        let l = planes_of.fit().unwrap();
        // SAFETY: the arguments are those of `planes_fit`.
        unsafe { launch(&l.kernel, l.grid, l.block, l.shared, a, Order::Ascending) }.unwrap();
        assert!(d.y == aligned.y && d.stats == aligned.stats);
    }
}
