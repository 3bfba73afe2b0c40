//! Time series, embedded in the program.
#![allow(dead_code)] // Each example uses some of it.

use candle_core::{Device, Error, Result, Tensor, bail};

/// Rows of one or more series, in time.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    /// Of the data set; the figure is called so.
    pub(crate) name: &'static str,
    /// Of each series.
    pub(crate) names: Vec<String>,
    /// One row after the other.
    pub(crate) values: Vec<f64>,
    /// How many rows train the network, the first ones.
    pub(crate) train: usize,
    /// Name of a row, such as a day.
    pub(crate) row: &'static str,
}

impl Series {
    /// Daily closes of four stock markets.
    pub(crate) fn stocks() -> Result<Self> {
        Self::parse(
            "stocks",
            "day",
            include_str!("../data/eu_stock_markets.csv"),
            0,
        )
    }

    /// Weekly CO2 at Mauna Loa. A gap keeps the value before it: what was known in that week.
    pub(crate) fn co2() -> Result<Self> {
        Self::parse("co2", "week", include_str!("../data/co2.csv"), 1)
    }

    /// The columns from `first` on, half of whose rows train.
    fn parse(name: &'static str, row: &'static str, text: &str, first: usize) -> Result<Self> {
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let header = reader.headers().map_err(Error::wrap)?.clone();
        let names: Vec<String> = header.iter().skip(first).map(str::to_string).collect();
        let mut values: Vec<f64> = vec![];
        for record in reader.records() {
            let record = record.map_err(Error::wrap)?;
            for field in record.iter().skip(first) {
                let before = values.len().checked_sub(names.len()).map(|at| values[at]);
                values.push(match (field.trim(), before) {
                    ("", Some(before)) => before,
                    (field, _) => field.parse().map_err(Error::wrap)?,
                });
            }
        }
        if values.is_empty() {
            bail!("{name}: expected rows, got none")
        }
        let train = values.len() / names.len() / 2;
        Ok(Self {
            name,
            names,
            values,
            train,
            row,
        })
    }

    /// The number of series.
    pub(crate) fn width(&self) -> usize {
        self.names.len()
    }

    pub(crate) fn rows(&self) -> usize {
        self.values.len() / self.width()
    }

    /// All rows, `[rows, width]`.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        Tensor::from_slice(&self.values, (self.rows(), self.width()), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_whole_and_gaps_keep_the_value_before() -> Result<()> {
        let (stocks, co2) = (Series::stocks()?, Series::co2()?);
        assert_eq!((stocks.rows(), stocks.width()), (1860, 4));
        assert_eq!((co2.rows(), co2.width()), (2284, 1));
        assert!(
            stocks
                .values
                .iter()
                .chain(&co2.values)
                .all(|v| v.is_finite())
        );
        let gaps = Series::parse("gaps", "day", "a,b\n1,2\n,3\n4,\n", 0)?;
        assert_eq!(gaps.values, [1., 2., 1., 3., 4., 3.]);
        assert!(Series::parse("gaps", "day", "a\n\n", 0).is_err());
        Ok(())
    }
}
