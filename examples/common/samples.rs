//! Drawn digits: the noise that they come from, a grid of them as an SVG file, and how good they
//! are.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Error, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::StandardNormal;

use super::common::Digits;

/// Pixels of the picture for one of an image.
const SCALE: usize = 6;

/// Images `[n, 1, 8, 8]` of noise of deviation 1.
pub(crate) fn noise(n: usize, rng: &mut StdRng) -> Result<Tensor> {
    let values: Vec<f32> = (0..n * 64).map(|_| rng.sample(StandardNormal)).collect();
    Tensor::from_vec(values, (n, 1, 8, 8), &Device::Cpu)
}

/// Writes images `[N, 1, H, W]` of gray from 0 (paper) to 1 (ink), those of each class in a column,
/// to `target/NAME.svg`.
pub(crate) fn write(name: &str, images: &Tensor) -> Result<()> {
    let file = Path::new("target").join(name).with_extension("svg");
    fs::create_dir_all("target")?;
    fs::write(&file, svg(images, 10)?)?;
    println!("Samples, a class in each column: {}", file.display());
    Ok(())
}

/// The picture, a gap of one pixel between images.
fn svg(images: &Tensor, columns: usize) -> Result<String> {
    let (count, _, high, wide) = images.dims4()?;
    let rows = count.div_ceil(columns);
    let (width, height) = (columns * (wide + 1) + 1, rows * (high + 1) + 1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" \
         viewBox=\"0 0 {width} {height}\" shape-rendering=\"crispEdges\">\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n",
        width * SCALE,
        height * SCALE,
    );
    for (at, gray) in (images.flatten_all()?.to_vec1::<f32>()?.into_iter()).enumerate() {
        let shade = 255 - (255. * gray.clamp(0., 1.)).round() as u8;
        if shade == 255 {
            continue;
        }
        let (image, y, x) = (at / (high * wide), at / wide % high, at % wide);
        let (left, top) = (image % columns * (wide + 1), image / columns * (high + 1));
        writeln!(
            svg,
            "<rect x=\"{}\" y=\"{}\" width=\"1\" height=\"1\" \
             fill=\"#{shade:02x}{shade:02x}{shade:02x}\"/>",
            left + 1 + x,
            top + 1 + y,
        )
        .map_err(Error::wrap)?;
    }
    svg += "</svg>\n";
    Ok(svg)
}

/// The percentage of the images whose nearest one of `known` has their class, and the mean squared
/// distance of two images of a class; prints both by `name`.
pub(crate) fn judge(name: &str, images: &Digits, known: &Digits) -> Result<(f32, f32)> {
    let nearest = distances(&images.images, &known.images)?.argmin(1)?;
    let right = known.labels.index_select(&nearest, 0)?.eq(&images.labels)?;
    let right = right.to_dtype(DType::F32)?.mean_all()?;
    let classes = images.labels.unsqueeze(1)?;
    let same = classes.broadcast_eq(&classes.t()?)?.to_dtype(DType::F32)?;
    let sum = (distances(&images.images, &images.images)? * &same)?.sum_all()?;
    let spread = (sum / same.sum_all()?)?;
    let (right, spread) = (100. * right.to_scalar::<f32>()?, spread.to_scalar::<f32>()?);
    println!("{name:12}{right:5.1} % nearest to their class, {spread:.2} apart within it");
    Ok((right, spread))
}

/// The squared distances of images, `[N, M]`.
fn distances(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (a.flatten_from(1)?, b.flatten_from(1)?);
    let squares = |x: &Tensor| x.sqr()?.sum_keepdim(1);
    let products = (a.matmul(&b.t()?)? * -2.)?.broadcast_add(&squares(&a)?)?;
    products.broadcast_add(&squares(&b)?.t()?)
}
