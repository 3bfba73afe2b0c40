//! Features of the data of a scaler: their axes and their names.

use std::collections::HashMap;
use std::fmt::{self, Display};

use candle_core::{Result, Tensor, bail};

use super::check;
use super::check::feature_count;

/// The features of a data set: the axes after the first, and a name for each of their elements if
/// there are names.
///
/// Features are counted along the trailing axes in row-major order: data `[N, 2, 3]` has six.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    axes: Option<Vec<usize>>,
    names: Option<Vec<String>>,
}

impl Features {
    /// Features with names, which data that comes later must be as many as. `layer` is the name of
    /// the scaler in messages, here and below.
    ///
    /// # Errors
    /// Two equal names.
    pub fn named(layer: &str, names: Vec<String>) -> Result<Self> {
        distinct_names(layer, &names)?;
        Ok(Self {
            axes: None,
            names: Some(names),
        })
    }

    /// Features as they were saved.
    pub(crate) fn from_parts(
        layer: &str,
        axes: Option<Vec<usize>>,
        names: Option<Vec<String>>,
    ) -> Result<Self> {
        let features = match names {
            Some(names) => Self::named(layer, names)?,
            None => Self::default(),
        };
        match axes {
            Some(axes) => {
                some_features(layer, &axes)?;
                features.with_axes(layer, &axes)
            }
            None => Ok(features),
        }
    }

    /// The axes of the features, which are those of the data without the first; none before there
    /// was data.
    pub fn axes(&self) -> Option<&[usize]> {
        self.axes.as_deref()
    }

    /// The names, if there are any.
    pub fn names(&self) -> Option<&[String]> {
        self.names.as_deref()
    }

    /// Number of features; 0 where neither data nor names said so yet.
    pub fn count(&self) -> usize {
        match (&self.axes, &self.names) {
            (Some(axes), _) => feature_count(axes),
            (None, names) => names.as_ref().map_or(0, Vec::len),
        }
    }

    /// Label of feature `index` in messages: `feature 3 "doors"`, or `feature [1, 0]` where there
    /// are several axes and no names.
    pub fn label(&self, index: usize) -> impl fmt::Display + '_ {
        Label {
            features: self,
            index,
        }
    }

    /// The features of `x`, `[N, features...]`, which must be these as far as anything is known of
    /// them.
    ///
    /// # Errors
    /// A scalar, or data of other features.
    pub fn of(&self, layer: &str, x: &Tensor) -> Result<Self> {
        check::rank_at_least(layer, x, 1, "[N, features...]")?;
        self.clone().with_axes(layer, &x.dims()[1..])
    }

    /// The names alone.
    pub fn without_axes(&self) -> Self {
        Self {
            axes: None,
            names: self.names.clone(),
        }
    }

    /// These, with the axes of data.
    fn with_axes(mut self, layer: &str, axes: &[usize]) -> Result<Self> {
        let count = feature_count(axes);
        if let Some(expected) = &self.axes {
            let first = count.min(self.count());
            feature_shape(layer, expected, axes, &self.label(first))?;
        } else if let Some(names) = &self.names {
            let first = count.min(names.len());
            name_count(layer, names.len(), count, &self.label(first))?;
        }
        self.axes = Some(axes.to_vec());
        Ok(self)
    }

    /// Both together, if `other` are the same features as far as both are known.
    ///
    /// # Errors
    /// Another number of features, or the first name that differs.
    pub fn joined(&self, layer: &str, other: &Self) -> Result<Self> {
        let mut joined = match &other.axes {
            Some(axes) => self.clone().with_axes(layer, axes)?,
            None => self.clone(),
        };
        if let Some(names) = &other.names {
            joined.check_names(layer, names)?;
            joined.names = Some(names.clone());
        }
        Ok(joined)
    }

    /// Whether `names` are the names of these features, in their order. Features without names take
    /// any.
    ///
    /// # Errors
    /// Another number of names, or the first that differs.
    pub fn check_names<S: AsRef<str>>(&self, layer: &str, names: &[S]) -> Result<()> {
        for (index, (expected, got)) in self.names.iter().flatten().zip(names).enumerate() {
            same_name(layer, index, expected, got.as_ref())?;
        }
        let known = self.axes.is_some() || self.names.is_some();
        if known {
            let first = self.count().min(names.len());
            let named = Self {
                axes: None,
                names: Some(names.iter().map(|n| n.as_ref().to_string()).collect()),
            };
            let label = match first < self.count() {
                true => self.label(first).to_string(),
                false => named.label(first).to_string(),
            };
            name_count(layer, names.len(), self.count(), &label)?;
        }
        Ok(())
    }
}

struct Label<'a> {
    features: &'a Features,
    index: usize,
}

impl fmt::Display for Label<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { features, index } = self;
        if let Some(name) = features.names.as_ref().and_then(|names| names.get(*index)) {
            return write!(f, "feature {index} {name:?}");
        }
        let axes = features.axes.as_deref().unwrap_or_default();
        if axes.len() < 2 || *index >= features.count() {
            return write!(f, "feature {index}");
        }
        let mut rest = *index;
        let mut position = vec![0; axes.len()];
        for (axis, size) in axes.iter().enumerate().rev() {
            position[axis] = rest % size.max(&1);
            rest /= size.max(&1);
        }
        write!(f, "feature {position:?}")
    }
}

fn distinct_names(layer: &str, names: &[String]) -> Result<()> {
    let mut seen = HashMap::new();
    for (index, name) in names.iter().enumerate() {
        if let Some(first) = seen.insert(name, index) {
            bail!("{layer}: expected distinct names, got {name:?} for features {first} and {index}")
        }
    }
    Ok(())
}

/// Saved axes of one feature at least.
fn some_features(layer: &str, axes: &[usize]) -> Result<()> {
    if feature_count(axes) == 0 {
        bail!("{layer}: expected axes of at least one feature in the saved state, got {axes:?}")
    }
    Ok(())
}

/// The trailing axes of data against those of the features. `first` is the first feature that one
/// of them lacks.
fn feature_shape(
    layer: &str,
    expected: &[usize],
    got: &[usize],
    first: &dyn Display,
) -> Result<()> {
    if expected != got {
        let (expected_count, count) = (feature_count(expected), feature_count(got));
        let what = match count.cmp(&expected_count) {
            std::cmp::Ordering::Less => format!("{count}: {first} is missing"),
            std::cmp::Ordering::Greater => format!("{count}: {first} is too many"),
            std::cmp::Ordering::Equal => {
                format!("the axes {got:?}; reshape the data: {first} would be another")
            }
        };
        bail!("{layer}: expected {expected_count} features of axes {expected:?}, got {what}")
    }
    Ok(())
}

/// As many names as features. `first` is the first feature that has no name, or the first name that
/// has no feature.
fn name_count(layer: &str, names: usize, features: usize, first: &dyn Display) -> Result<()> {
    if names != features {
        let what = match features < names {
            true => "has no data",
            false => "has no name",
        };
        bail!(
            "{layer}: expected as many features as names, {names}, got {features}: {first} {what}"
        )
    }
    Ok(())
}

fn same_name(layer: &str, index: usize, expected: &str, got: &str) -> Result<()> {
    if expected != got {
        bail!("{layer}: expected feature {index} to be {expected:?}, got {got:?}")
    }
    Ok(())
}
