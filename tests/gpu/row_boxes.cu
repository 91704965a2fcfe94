// Gathering rows of 1,152 bytes into swizzled slices by the copy engine: a tensor box of 1 x 64 columns per row and slice, for one CTA or
// for both of a cluster. Beside it the same by cp.async, two tiles in flight. Nothing is computed; clk per tile of 64 rows, the slowest CTA.
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a tests/gpu/row_boxes.cu -o row_boxes && ./row_boxes
// What it said: docs/kernels/prefill_sparse.md, log 13.
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <cuda.h>
#include <cuda_runtime.h>
#define CK(x) do{cudaError_t e=(x); if(e){printf("ERR %s line %d\n",cudaGetErrorString(e),__LINE__);exit(1);} }while(0)
__device__ __forceinline__ uint32_t s2u(const void*p){return (uint32_t)__cvta_generic_to_shared(p);}
__device__ __forceinline__ void mb_init(uint32_t b,int c){asm volatile("mbarrier.init.shared.b64 [%0], %1;"::"r"(b),"r"(c));}
__device__ __forceinline__ void mb_tx(uint32_t b,int n){asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"::"r"(b),"r"(n):"memory");}
__device__ __forceinline__ void mb_wait(uint32_t b,int ph){asm volatile("{.reg .pred p; L: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra L;}"::"r"(b),"r"(ph):"memory");}
__device__ __forceinline__ void mb_remote(uint32_t b,uint32_t cta){asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r];}"::"r"(b),"r"(cta):"memory");}
__device__ __forceinline__ void tma(uint32_t d,const CUtensorMap*m,int c,int r,uint32_t b){asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"::"r"(d),"l"(m),"r"(c),"r"(r),"r"(b):"memory");}
__device__ __forceinline__ void tma_mc(uint32_t d,const CUtensorMap*m,int c,int r,uint32_t b,uint16_t k){asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"::"r"(d),"l"(m),"r"(c),"r"(r),"r"(b),"h"(k):"memory");}
// mode 0: boxes, one lane per warp; 1: boxes, 16 lanes per warp, a row each; 2: like 0 to both CTAs; 3: like 1 to both
__global__ void __launch_bounds__(128,1) k(const __grid_constant__ CUtensorMap m,int tiles,int rows,int mode,int warps,long long*out){
  extern __shared__ __align__(1024) char sm[]; __shared__ uint64_t full[2][4],fre[2][4]; uint32_t rank; asm volatile("mov.u32 %0, %%cluster_ctarank;":"=r"(rank));
  uint32_t base=(s2u(sm)+1023)&~1023; int w=threadIdx.x/32,l=threadIdx.x%32; bool mc=mode>=2, wide=mode&1;
  if(threadIdx.x==0){ for(int i=0;i<8;i++){ mb_init(s2u(&full[0][0]+i),1); mb_init(s2u(&fre[0][0]+i),1);} asm volatile("fence.mbarrier_init.release.cluster;"); }
  __syncthreads(); asm volatile("barrier.cluster.arrive.aligned;barrier.cluster.wait.aligned;");
  long long t0=clock64();
  if(w<warps){ int per=64/warps, mine=mc?per/2:per; uint32_t h=blockIdx.x*7919u+w*104729u+l*31u+1u; if(mc) h=(blockIdx.x/2)*7919u+w*104729u+rank*977u+l*31u+1u;
    for(int t=0;t<tiles;t++){ int st=t&1,ph=(t>>1)&1; uint32_t b=s2u(&full[st][w]);
      if(t>=2){ mb_wait(b,ph^1); if(mc){ if(l==0) mb_remote(s2u(&fre[st][w]),rank^1); mb_wait(s2u(&fre[st][w]),ph^1); } }
      if(l==0) mb_tx(b,per*9*128); __syncwarp();
      uint32_t d0=base+st*73728; int first=w*per+(mc?(int)rank*mine:0);
      if(wide){ for(int i=l;i<mine;i+=16) if(l<16){ h=h*1664525u+1013904223u; int r=(h>>8)%rows; uint32_t d=d0+(first+i)*128;
          #pragma unroll
          for(int s=0;s<9;s++){ if(mc) tma_mc(d+s*8192,&m,s*64,r,b,3); else tma(d+s*8192,&m,s*64,r,b); } } }
      else if(l==0){ for(int i=0;i<mine;i++){ h=h*1664525u+1013904223u; int r=(h>>8)%rows; uint32_t d=d0+(first+i)*128;
          #pragma unroll
          for(int s=0;s<9;s++){ if(mc) tma_mc(d+s*8192,&m,s*64,r,b,3); else tma(d+s*8192,&m,s*64,r,b); } } }
      __syncwarp();
    }
    for(int t=tiles;t<tiles+2;t++) mb_wait(s2u(&full[t&1][w]),((t>>1)&1)^1);
  }
  __syncthreads(); if(threadIdx.x==0) out[blockIdx.x]=clock64()-t0;
  asm volatile("barrier.cluster.arrive.aligned;barrier.cluster.wait.aligned;");
}
__global__ void __launch_bounds__(128,1) kc(const char*g,int tiles,int rows,long long*out){
  extern __shared__ __align__(1024) char sm[]; uint32_t base=(s2u(sm)+1023)&~1023; int w=threadIdx.x/32,l=threadIdx.x%32; long long t0=clock64(); uint32_t h=blockIdx.x*7919u+w*104729u+(l/8)*31u+1u;
  for(int t=0;t<tiles;t++){ 
    #pragma unroll
    for(int i=0;i<4;i++){ h=h*1664525u+1013904223u; int r=(h>>8)%rows; const char*a=g+(size_t)r*1152+(l&7)*16; uint32_t d=base+(t&1)*73728+(w*16+i*4+l/8)*128+((l&7)*16^((i*4+l/8)&7)*16);
      #pragma unroll
      for(int s=0;s<9;s++) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"::"r"(d+s*8192),"l"(a+s*128)); }
    asm volatile("cp.async.commit_group; cp.async.wait_group 1;");
  }
  asm volatile("cp.async.wait_all;"); __syncthreads(); if(threadIdx.x==0) out[blockIdx.x]=clock64()-t0;
}
static long long h[132];
int main(){
  size_t big=(size_t)65536*1152; char*g; long long*o; CK(cudaMalloc(&g,big)); CK(cudaMemset(g,1,big)); CK(cudaMalloc(&o,sizeof h));
  void*fn; cudaDriverEntryPointQueryResult q; CK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled",&fn,12000,cudaEnableDefault,&q)); auto enc=(decltype(&cuTensorMapEncodeTiled))fn;
  CUtensorMap m; cuuint64_t d[2]={576,65536},st[1]={1152}; cuuint32_t bx[2]={64,1},es[2]={1,1};
  CUresult r=enc(&m,CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,2,g,d,st,bx,es,CU_TENSOR_MAP_INTERLEAVE_NONE,CU_TENSOR_MAP_SWIZZLE_128B,CU_TENSOR_MAP_L2_PROMOTION_L2_128B,CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE); if(r){printf("enc %d\n",r);return 1;}
  CK(cudaFuncSetAttribute(k,cudaFuncAttributeMaxDynamicSharedMemorySize,160*1024)); CK(cudaFuncSetAttribute(kc,cudaFuncAttributeMaxDynamicSharedMemorySize,160*1024));
  int T=200;
  for(int rows=8192;rows<=65536;rows*=8){
  for(int mode=0;mode<4;mode++) for(int warps=1;warps<=4;warps*=2){
    cudaLaunchConfig_t c={}; c.gridDim=132; c.blockDim=128; c.dynamicSmemBytes=160*1024; cudaLaunchAttribute at[1]; at[0].id=cudaLaunchAttributeClusterDimension; at[0].val.clusterDim={2,1,1}; c.attrs=at; c.numAttrs=1;
    for(int i=0;i<3;i++) CK(cudaLaunchKernelEx(&c,k,m,T,rows,mode,warps,o)); CK(cudaDeviceSynchronize());
    CK(cudaMemcpy(h,o,sizeof h,cudaMemcpyDeviceToHost)); double mx=0; for(auto x:h) if(x>mx) mx=x;
    printf("rows %d mode %d (%s%s) warps %d: %.0f clk per tile of 64 rows, %.2f clk per box issued, %.1f B/clk/SM received\n",rows,mode,mode&1?"16 lanes":"1 lane",mode>=2?", both CTAs":"",warps,mx/T,mx/T/(mode>=2?288:576),73728.0*T/mx); fflush(stdout);
  }
  for(int i=0;i<3;i++) kc<<<132,128,160*1024>>>(g,T,rows,o); CK(cudaDeviceSynchronize()); CK(cudaMemcpy(h,o,sizeof h,cudaMemcpyDeviceToHost)); double mx=0; for(auto x:h) if(x>mx) mx=x;
  printf("rows %d cp.async, two tiles in flight: %.0f clk per tile, %.1f B/clk/SM\n",rows,mx/T,73728.0*T/mx); fflush(stdout);
  }
}
