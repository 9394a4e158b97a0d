package cloudflare

import (
	"cmp"
	"context"
	"fmt"

	sdk "github.com/cloudflare/cloudflare-go/v6"
	"github.com/cloudflare/cloudflare-go/v6/option"
	"github.com/cloudflare/cloudflare-go/v6/r2"
)

// EnsureBucket creates the bucket where it is missing.
func (c *Client) EnsureBucket(ctx context.Context, bucket string) (created bool, err error) {
	found, err := c.hasBucket(ctx, bucket)
	if found || err != nil {
		return false, err
	}
	params := r2.BucketNewParams{AccountID: sdk.F(c.options.AccountID), Name: sdk.F(bucket)}
	if c.options.Jurisdiction != "" {
		params.Jurisdiction = sdk.F(r2.BucketNewParamsCfR2Jurisdiction(c.options.Jurisdiction))
	}
	what := fmt.Sprintf("create bucket %q", bucket)
	err = c.ask(ctx, request{what, StorageWrite, func(ctx context.Context, watch option.RequestOption) error {
		_, err := c.buckets.New(ctx, params, watch)
		return err
	}})
	if isCode(err, codeBucketExists) { // made meanwhile, or by an attempt whose answer got lost
		return true, nil
	}
	return err == nil, err
}

func (c *Client) hasBucket(ctx context.Context, bucket string) (bool, error) {
	params := r2.BucketGetParams{AccountID: sdk.F(c.options.AccountID)}
	if c.options.Jurisdiction != "" {
		params.Jurisdiction = sdk.F(r2.BucketGetParamsCfR2Jurisdiction(c.options.Jurisdiction))
	}
	what := fmt.Sprintf("look bucket %q up", bucket)
	err := c.ask(ctx, request{what, StorageWrite, func(ctx context.Context, watch option.RequestOption) error {
		_, err := c.buckets.Get(ctx, bucket, params, watch)
		return err
	}})
	if isCode(err, codeNoSuchBucket) {
		return false, nil
	}
	return err == nil, err
}

// resource is how policies name the bucket
// (developers.cloudflare.com/r2/api/tokens, "Access Policy").
func (c *Client) resource(bucket string) string {
	return fmt.Sprintf("com.cloudflare.edge.r2.bucket.%s_%s_%s", c.options.AccountID, cmp.Or(c.options.Jurisdiction, "default"), bucket)
}
