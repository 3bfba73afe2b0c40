#![doc = include_str!("../docs/guide.md")]
#![doc = include_str!("../docs/links.html")]

#[doc = include_str!("../docs/migration.md")]
#[doc = include_str!("../docs/links.html")]
pub mod migration {}

#[doc = include_str!("../docs/numerics.md")]
#[doc = include_str!("../docs/links.html")]
pub mod numerics {}

#[doc = include_str!("../docs/scaling.md")]
#[doc = include_str!("../docs/links.html")]
pub mod scaling {}

#[doc = include_str!("../docs/distributed.md")]
#[doc = include_str!("../docs/links.html")]
pub mod distributed {}

#[doc = include_str!("../docs/performance.md")]
#[doc = include_str!("../docs/links.html")]
pub mod performance {}

#[doc = include_str!("../docs/math.md")]
#[doc = include_str!("../docs/links.html")]
pub mod math {}

#[doc = include_str!("../docs/claims.md")]
#[doc = include_str!("../docs/links.html")]
pub mod claims {}
